//! What the process is told by signals.

use anyhow::Result;
use futures::FutureExt;
use futures::future::select_all;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Event;

/// Those that end it, and the one that has it read its configuration anew.
pub(super) struct Signals {
    stops: Vec<(&'static str, Signal)>,
    reload: Signal,
}

impl Signals {
    pub(super) fn catch() -> Result<Signals, std::io::Error> {
        let catch = |name, kind| Ok::<_, std::io::Error>((name, signal(kind)?));
        let stops = vec![catch("SIGTERM", SignalKind::terminate())?, catch("SIGINT", SignalKind::interrupt())?];
        Ok(Signals { stops, reload: signal(SignalKind::hangup())? })
    }

    /// The next of them.
    pub(super) async fn next(&mut self) -> Event {
        let Signals { stops, reload } = self;
        let reload = reload.recv().map(|_| Event::Reload).boxed_local();
        let stops = stops.iter_mut().map(|(name, signal)| {
            let name = *name;
            signal.recv().map(move |_| Event::Stop(name)).boxed_local()
        });
        select_all(stops.chain([reload])).await.0
    }
}
