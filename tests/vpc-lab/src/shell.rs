//! The lab by hand: EC2's verbs, programs on the instances and probes, a line each. From a terminal it prompts; from a pipe
//! it stops at the first line that fails.

use std::io::{self, BufRead, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::process::CommandExt;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::demo::Demo;
use crate::lab::Distribution;
use crate::metadata::Propagation;
use crate::probe::{Bound, Kind, Probe};
use crate::table::{Align, Cell, Style, Table};
use crate::vpc::{CreateEni, EniId};

const PATIENCE: Duration = Duration::from_secs(1);

const ABOUT: &str = "\
An ENI is named by its id, or as INSTANCE/LINK (web/ens6). Try:
  run web ip rule            run web eniup plan          run web eniup reconcile
  probe subnet-d 10.0.1.30   drops                       enter web";

#[derive(Parser)]
#[command(no_binary_name = true, disable_version_flag = true, name = "", about = ABOUT, max_term_width = 120)]
struct Line {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Show the VPC: subnets, ENIs with their addresses, instances.
    Describe,
    /// Show who reaches what, and what the VPC dropped meanwhile.
    Look,
    /// Run a program on a node: an instance, a client, a container.
    #[command(trailing_var_arg = true)]
    Run {
        node: String,
        #[arg(required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Open a shell on a node.
    Enter {
        node: String,
    },
    /// Ask an address from a node, by every kind of exchange or one.
    Probe {
        from: String,
        to: IpAddr,
        #[arg(long, value_enum)]
        kind: Option<KindName>,
        /// Bind to this address.
        #[arg(long, value_name = "ADDRESS")]
        source: Option<IpAddr>,
        /// Bind to this link.
        #[arg(long, value_name = "LINK", conflicts_with = "source")]
        device: Option<String>,
    },
    /// Show what the VPC dropped, and why.
    Drops {
        /// Count from zero again.
        #[arg(long)]
        reset: bool,
    },
    /// Let metadata of an instance lag behind by this many milliseconds.
    DelayMetadata {
        instance: String,
        milliseconds: u64,
    },
    /// Create an ENI; without addresses it gets a free IPv4 one.
    CreateNetworkInterface {
        subnet: String,
        /// Addresses and delegated prefixes, of both families.
        addresses: Vec<String>,
    },
    DeleteNetworkInterface {
        eni: String,
    },
    AttachNetworkInterface {
        eni: String,
        instance: String,
        device: u32,
        #[arg(long, default_value_t = 0)]
        card: u32,
    },
    DetachNetworkInterface {
        eni: String,
    },
    /// Detach an ENI and attach it to another instance.
    MoveNetworkInterface {
        eni: String,
        instance: String,
        device: u32,
    },
    /// Assign addresses (10.0.0.7) and delegated prefixes (10.0.0.64/28), of both families.
    #[command(visible_alias = "assign-ipv6-addresses")]
    AssignPrivateIpAddresses {
        eni: String,
        #[arg(required = true)]
        addresses: Vec<String>,
        /// Take them from the ENI that has them.
        #[arg(long)]
        allow_reassignment: bool,
    },
    #[command(visible_alias = "unassign-ipv6-addresses")]
    UnassignPrivateIpAddresses {
        eni: String,
        #[arg(required = true)]
        addresses: Vec<String>,
    },
    /// A new elastic IP.
    AllocateAddress,
    AssociateAddress {
        public: Ipv4Addr,
        eni: String,
        private: Option<Ipv4Addr>,
    },
    DisassociateAddress {
        public: Ipv4Addr,
    },
    /// Launch an instance whose primary ENI is this one.
    RunInstance {
        name: String,
        eni: String,
    },
    StopInstance {
        instance: String,
    },
    StartInstance {
        instance: String,
    },
    /// Switch the source/destination check of an ENI.
    ModifySourceDestCheck {
        eni: String,
        state: Switch,
    },
    /// Route a destination of a subnet through an ENI.
    CreateRoute {
        subnet: String,
        destination: IpNet,
        eni: String,
    },
    /// Leave; nothing of the lab stays behind.
    Exit,
}

#[derive(Clone, Copy, ValueEnum)]
enum KindName {
    Icmp,
    Udp,
    Tcp,
}

#[derive(Clone, Copy, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// Reads and carries out lines until the end; gives whether all of them succeeded.
///
/// # Errors
/// Input that cannot be read.
pub fn talk(demo: &mut Demo) -> Result<bool> {
    let is_terminal = io::stdin().is_terminal();
    if is_terminal {
        println!("Type help for the verbs, exit or Ctrl-D to leave.");
    }
    let mut lines = io::stdin().lock().lines();
    loop {
        if is_terminal {
            print!("lab> ");
            io::stdout().flush()?;
        }
        let Some(line) = lines.next() else { return Ok(true) };
        let line = line.context("reading a line")?;
        let Some(words) = shlex::split(&line) else {
            eprintln!("a quote is not closed: {line}");
            if !is_terminal {
                return Ok(false);
            }
            continue;
        };
        if words.first().is_none_or(|word| word.starts_with('#')) {
            continue;
        }
        match Line::try_parse_from(words) {
            Ok(Line { verb: Verb::Exit }) => return Ok(true),
            Ok(Line { verb }) => {
                if let Err(error) = demo.carry_out(verb) {
                    eprintln!("{error:#}");
                    if !is_terminal {
                        return Ok(false);
                    }
                }
            }
            Err(error) => {
                // Nobody is left to tell when even this cannot be printed.
                let _ = error.print();
                if error.use_stderr() && !is_terminal {
                    return Ok(false);
                }
            }
        }
    }
}

impl Demo {
    fn carry_out(&mut self, verb: Verb) -> Result<()> {
        match verb {
            Verb::Describe => self.describe_all(),
            Verb::Look => self.look("now", true).map(|_| ()),
            Verb::Run { node, command } => self.run(&node, &command),
            Verb::Enter { node } => {
                let shell = std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".into());
                self.run(&node, &[shell])
            }
            Verb::Probe { from, to, kind, source, device } => self.ask(&from, to, kind, source, device),
            Verb::Drops { reset } => self.drops(reset),
            Verb::DelayMetadata { instance, milliseconds } => {
                let delay = Duration::from_millis(milliseconds);
                self.scene.lab.set_propagation(&instance, Propagation { delay, ..Propagation::default() })
            }
            Verb::CreateNetworkInterface { subnet, addresses } => self.create(subnet, &addresses),
            Verb::DeleteNetworkInterface { eni } => self.scene.lab.delete_network_interface(&self.eni(&eni)?),
            Verb::AttachNetworkInterface { eni, instance, device, card } => {
                self.scene.lab.attach_network_interface(&self.eni(&eni)?, &instance, card, device)
            }
            Verb::DetachNetworkInterface { eni } => self.scene.lab.detach_network_interface(&self.eni(&eni)?),
            Verb::MoveNetworkInterface { eni, instance, device } => {
                self.scene.lab.move_network_interface(&self.eni(&eni)?, &instance, 0, device)
            }
            Verb::AssignPrivateIpAddresses { eni, addresses, allow_reassignment } => {
                self.scene.lab.assign(&self.eni(&eni)?, &sources(&addresses)?, allow_reassignment)
            }
            Verb::UnassignPrivateIpAddresses { eni, addresses } => {
                self.scene.lab.unassign(&self.eni(&eni)?, &sources(&addresses)?)
            }
            Verb::AllocateAddress => {
                println!("{}", self.scene.lab.allocate_address());
                Ok(())
            }
            Verb::AssociateAddress { public, eni, private } => {
                self.scene.lab.associate_address(public, &self.eni(&eni)?, private)
            }
            Verb::DisassociateAddress { public } => self.scene.lab.disassociate_address(public),
            Verb::RunInstance { name, eni } => {
                self.scene.lab.run_instance(&name, &[self.eni(&eni)?], "m7i.large", Distribution::Primary)
            }
            Verb::StopInstance { instance } => self.scene.lab.stop_instance(&instance),
            Verb::StartInstance { instance } => self.scene.lab.start_instance(&instance),
            Verb::ModifySourceDestCheck { eni, state } => {
                let eni = self.eni(&eni)?;
                self.scene.lab.fabric.world(|world| world.modify_source_dest_check(&eni, matches!(state, Switch::On)))
            }
            Verb::CreateRoute { subnet, destination, eni } => {
                let eni = self.eni(&eni)?;
                self.scene.lab.fabric.world(|world| world.create_route(&subnet, destination, &eni))
            }
            Verb::Exit => Ok(()),
        }
    }

    /// The id behind `eni-…` or `web/ens6`.
    fn eni(&self, name: &str) -> Result<EniId> {
        let world = self.scene.lab.world();
        let is_meant = |id: &&EniId| {
            *id == name || self.scene.lab.link_of(id).is_some_and(|(node, link)| format!("{node}/{link}") == name)
        };
        let found = world.enis.keys().find(is_meant).cloned();
        found.with_context(|| {
            format!("InvalidNetworkInterfaceID.NotFound: {name} (describe shows all; web/ens6 will do)")
        })
    }

    fn create(&mut self, subnet: String, addresses: &[String]) -> Result<()> {
        let mut create = CreateEni { subnet, ..CreateEni::default() };
        for source in sources(addresses)? {
            match source {
                IpNet::V4(net) if net.prefix_len() == 32 => create.ipv4s.push(net.addr()),
                IpNet::V6(net) if net.prefix_len() == 128 => create.ipv6s.push(net.addr()),
                IpNet::V4(net) => create.ipv4_prefixes.push(Ipv4Net::trunc(&net)),
                IpNet::V6(net) => create.ipv6_prefixes.push(Ipv6Net::trunc(&net)),
            }
        }
        println!("{}", self.scene.lab.create_network_interface(create)?);
        Ok(())
    }

    fn run(&self, node: &str, words: &[String]) -> Result<()> {
        let (program, arguments) = words.split_first().context("name a program")?;
        let mut command = self.scene.lab.command(node, program)?;
        let folder = self.scene.lab.eniup.parent().map(|folder| folder.display().to_string()).unwrap_or_default();
        let path = std::env::var("PATH").unwrap_or_default();
        command.args(arguments).env("PATH", format!("{folder}:{path}")).env("PS1", format!("[{node}] # "));
        // SAFETY: signal is async-signal-safe; the lab itself may ignore what its programs must not.
        unsafe {
            command.pre_exec(|| {
                libc::signal(libc::SIGINT, libc::SIG_DFL);
                Ok(())
            })
        };
        let status = command.status().with_context(|| format!("running {program} on {node}"))?;
        match status.success() {
            true => Ok(()),
            false => bail!("{program} on {node}: {status}"),
        }
    }

    fn ask(
        &self,
        from: &str,
        to: IpAddr,
        kind: Option<KindName>,
        source: Option<IpAddr>,
        device: Option<String>,
    ) -> Result<()> {
        let kinds = match kind {
            None => Kind::ALL.to_vec(),
            Some(KindName::Icmp) => vec![Kind::Icmp],
            Some(KindName::Udp) => vec![Kind::Udp],
            Some(KindName::Tcp) => vec![Kind::Tcp],
        };
        let bound = match (source, device) {
            (Some(address), _) => Bound::Address(address),
            (None, Some(device)) => Bound::Device(device),
            (None, None) => Bound::Nothing,
        };
        let probe = |kind: &Kind| Probe { from: from.into(), bound: bound.clone(), to, kind: *kind };
        let probes: Vec<Probe> = kinds.iter().map(probe).collect();
        let outcomes = self.scene.lab.probe(&probes, PATIENCE)?;
        for (kind, outcome) in kinds.iter().zip(&outcomes) {
            println!("{kind:4}  {outcome}");
        }
        match outcomes.iter().all(|outcome| outcome.is_answer_of(to)) {
            true => Ok(()),
            false => bail!("{to} did not answer {from} as it should (drops tells what the VPC dropped)"),
        }
    }

    fn drops(&self, reset: bool) -> Result<()> {
        let mut table = Table::new(["packets", "reason", "came in by"].map(Cell::from).into(), Align::Left);
        for ((port, reason), count) in self.scene.lab.fabric.drops() {
            table.push(vec![count.to_string().into(), reason.to_string().into(), format!("{port:?}").into()]);
        }
        print!("{table}");
        self.scene.lab.fabric.last_drops().iter().rev().take(10).for_each(|drop| println!("  {drop}"));
        if reset {
            self.scene.lab.fabric.forget_drops();
        }
        Ok(())
    }

    fn describe_all(&self) -> Result<()> {
        let world = self.scene.lab.world();
        let mut subnets = Table::new(["subnet", "VPC", "CIDRs"].map(Cell::from).into(), Align::Left);
        for (id, subnet) in &world.subnets {
            let cidrs = subnet.ipv4.iter().map(ToString::to_string);
            let cidrs: Vec<String> = cidrs.chain(subnet.ipv6s.iter().map(ToString::to_string)).collect();
            subnets.push(vec![id.clone().into(), subnet.vpc.clone().into(), cidrs.join(" ").into()]);
        }
        println!("{subnets}");
        let header = ["ENI", "at", "MAC", "subnet", "addresses (elastic), prefixes"];
        let mut enis = Table::new(header.map(Cell::from).into(), Align::Left);
        for eni in world.enis.values() {
            let publics = world.associations_of(&eni.id);
            let public = |address: &IpAddr| {
                publics.iter().find(|(_, private)| IpAddr::from(*private) == *address).map(|(public, _)| *public)
            };
            let own = eni.addresses();
            let own = own.iter().map(|address| match public(address) {
                Some(public) => format!("{address} ({public})"),
                None => address.to_string(),
            });
            let prefixes = eni.ipv4_prefixes.iter().map(ToString::to_string);
            let prefixes = prefixes.chain(eni.ipv6_prefixes.iter().map(ToString::to_string));
            let at = self.scene.lab.link_of(&eni.id).map(|(node, link)| Cell::from(format!("{node}/{link}")));
            enis.push(vec![
                eni.id.clone().into(),
                at.unwrap_or_else(|| Cell::styled("-", Style::Faint)),
                eni.mac.to_string().into(),
                eni.subnet.clone().into(),
                own.chain(prefixes).collect::<Vec<_>>().join(" ").into(),
            ]);
        }
        println!("{enis}");
        let mut nodes = Table::new(["node", "what it is"].map(Cell::from).into(), Align::Left);
        for name in self.scene.lab.nodes() {
            let instance = self.scene.lab.instances().find(|(instance, _)| *instance == name);
            let what = instance.map_or("a host outside or a container".into(), |(_, id)| format!("instance {id}"));
            nodes.push(vec![name.into(), what.into()]);
        }
        println!("{nodes}");
        Ok(())
    }
}

/// Addresses as whole-length prefixes, and prefixes as they are.
fn sources(texts: &[String]) -> Result<Vec<IpNet>> {
    let source = |text: &String| {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        address.or_else(|_| text.parse::<IpNet>()).with_context(|| format!("{text} is neither an address nor a prefix"))
    };
    texts.iter().map(source).collect()
}
