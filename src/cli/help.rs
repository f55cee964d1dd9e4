//! What each `--help` ends with: examples, each of which a test gives to the parser, and what exit codes mean there.

pub(super) const ENIUP: &str = "\
Examples:
  eniup plan                  what would change, as ip(8) commands; changes nothing
  sudo eniup reconcile        make the kernel agree with instance metadata
  sudo eniup reconcile --confirm 60   the same, and undo it after 60 s unless somebody types:
  sudo eniup confirm          keep what the run on trial did
  eniup status                every ENI, as metadata and the kernel have it
  eniup explain --from 10.0.1.20 --to 192.0.2.7
                              which way such a packet goes, why, and whether the VPC takes it
  eniup wait --ip 10.0.1.77   until that address is configured, for scripts that move one here
  eniup doctor                what is wrong on this machine, and what to do about it
  sudo eniup release          take away everything that eniup added
  eniup snapshot -o FILE      all that eniup looks at, for a bug report; `eniup plan --snapshot FILE` looks at it again

Exit codes:
  0 ok   1 failed   2 differences (with --detailed-exitcode)   3 an ENI is pending or failed, the others are done
  64 usage   69 metadata unavailable   75 another run is busy or on trial   77 needs CAP_NET_ADMIN   78 bad configuration";

pub(super) const RECONCILE: &str = "\
Examples:
  sudo eniup reconcile                   once, now; a second run finds nothing to do and says nothing
  eniup reconcile --dry-run              only print what it would do; with --detailed-exitcode 2 when there is something
  sudo eniup reconcile --confirm 60      undo it unless `sudo eniup confirm` is typed within a minute
  sudo eniup reconcile --automatic       as a timer runs it: what metadata lacks once is not taken away
  sudo eniup reconcile --timeout 5s --metrics /run/eniup/eniup.prom

Exit codes:
  0 all is as it should be   1 failed   2 differences (with --detailed-exitcode)
  3 an ENI is pending or failed, the others are done
  69 metadata unavailable   75 another run is busy or on trial   77 needs CAP_NET_ADMIN   78 bad configuration";

pub(super) const CONFIRM: &str = "\
Examples:
  sudo eniup reconcile --confirm 60      and then, if all still works, in this or another session:
  sudo eniup confirm

Exit codes:
  0 confirmed   1 nothing is on trial, or it is rolled back already   75 another run is busy   77 needs CAP_NET_ADMIN";

pub(super) const PLAN: &str = "\
Examples:
  eniup plan                             what would change on this machine
  eniup plan --detailed-exitcode         the same; 2 when something would
  eniup plan --json                      the same for programs
  eniup plan --snapshot FILE             on the machine of which `eniup snapshot` has made this file
  eniup plan --metadata FILE             on a fresh machine with this metadata

Exit codes:
  0 ok   2 differences (with --detailed-exitcode)   3 not all can be planned for an ENI   69 metadata unavailable";

pub(super) const STATUS: &str = "\
Examples:
  eniup status                           ENIs, their addresses, and what differs
  eniup status --json                    the same for programs
  eniup status --snapshot FILE           of the machine of which `eniup snapshot` has made this file

Exit codes:
  0 ok   3 an ENI is pending or failed   69 metadata unavailable";

pub(super) const EXPLAIN: &str = "\
Examples:
  eniup explain --from 10.0.1.20                   what an ENI's address sends to the internet
  eniup explain 10.0.9.9                           what a program sends that binds to no address
  eniup explain --from 10.0.1.20 --to 172.17.0.2   what it answers to a container
  eniup explain --oif ens6 --to 192.0.2.7          what curl --interface ens6 sends
  eniup explain --iif docker0 --from 10.0.1.97     what a container with a delegated address sends

Exit codes:
  0 ok, whatever becomes of the packet   1 the kernel and the model disagree";

pub(super) const WATCH: &str = "\
Examples:
  sudo systemctl enable --now eniup-watch     at boot and from now on
  sudo eniup watch -v                         in this terminal, to see what it does; Ctrl-C ends it
  sudo eniup watch --interval 10s             ask metadata less often; the kernel's changes are seen at once all the same

Exit codes:
  0 told to stop   1 the kernel tells nothing any more   77 needs CAP_NET_ADMIN   78 bad configuration";

pub(super) const WAIT: &str = "\
Examples:
  eniup wait --ip 10.0.1.77 --timeout 60s          then start what binds to it
  eniup wait --eni eni-0123456789abcdef0           all of an ENI that was attached just now

Exit codes:
  0 configured   1 waiting does not help   3 not configured in time   69 metadata unavailable";

pub(super) const DOCTOR: &str = "\
Examples:
  eniup doctor                           each finding with what to do about it
  eniup doctor --json                    the same for programs
  eniup doctor --snapshot FILE           of the machine of which `eniup snapshot` has made this file

Exit codes:
  0 nothing fails   1 a check fails";

pub(super) const SNAPSHOT: &str = "\
Examples:
  eniup snapshot -o snapshot.json                  for a colleague
  eniup snapshot --redact -o snapshot.json         for a public bug report
  eniup snapshot -o snapshot.json --timeout 3s     also where metadata does not answer

Exit codes:
  0 ok   69 metadata unavailable, and 78 bad configuration: the file is written all the same";

pub(super) const RELEASE: &str = "\
Examples:
  eniup release --dry-run                what would be taken away
  sudo eniup release                     take it away; stop the units first, or they bring it back
  sudo eniup release --eni eni-0123456789abcdef0   that of one ENI, before the configuration ignores it

Exit codes:
  0 ok   1 something could not be taken away   75 another run is busy, or on trial (--eni)   77 needs CAP_NET_ADMIN";

pub(super) const COMPLETIONS: &str = "\
Examples:
  eniup completions bash                 from ~/.bashrc: source <(eniup completions bash)
  eniup completions zsh                  from ~/.zshrc, behind compinit: source <(eniup completions zsh)
  eniup completions fish                 into ~/.config/fish/completions/eniup.fish";

pub(super) const MAN: &str = "\
Examples:
  eniup man                              eniup(8), for `man -l -`
  eniup man plan                         eniup-plan(8)
  eniup man eniup.toml                   eniup.toml(5)

Exit codes:
  0 ok   64 no such page";

pub(super) const CONFIG: &str = "\
Examples:
  eniup config check                     before a restart
  eniup config show                      every value that is in effect, and which line has it
  eniup --config new.toml config check   a file that is not installed yet";

pub(super) const CONFIG_CHECK: &str = "\
Examples:
  eniup config check                     all files
  eniup config check --config new.toml   this one alone

Exit codes:
  0 ok   78 bad configuration";

pub(super) const CONFIG_SHOW: &str = "\
Examples:
  eniup config show                      as a configuration file with comments
  eniup config show --json               for programs

Exit codes:
  0 ok   78 bad configuration";

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory};

    use super::super::arguments::Cli;

    /// Words up to what is said of them, which stands two spaces behind.
    fn examples(help: &str) -> Vec<Vec<&str>> {
        let lines = help.lines().filter_map(|line| line.strip_prefix("  "));
        let commands = lines.map(|line| line.split("  ").next().unwrap_or_default());
        let commands = commands.map(|command| command.trim_start_matches("sudo "));
        commands.filter(|command| command.starts_with("eniup ")).map(|command| command.split(' ').collect()).collect()
    }

    fn check(command: &Command, name: &str) {
        let help = command.get_after_help().map(|help| help.to_string()).unwrap_or_default();
        let examples = examples(&help);
        assert!(!examples.is_empty(), "`{name} --help` has no example");
        let is_of_it = |words: &Vec<&str>| name.split(' ').all(|word| words.contains(&word));
        assert!(examples.iter().any(is_of_it), "no example of `{name}` is one of it: {examples:?}");
        for words in examples {
            if let Err(error) = Cli::command().try_get_matches_from(&words) {
                panic!("`{}` in `{name} --help`: {error}", words.join(" "));
            }
        }
        for below in command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help") {
            check(below, &format!("{name} {}", below.get_name()));
        }
    }

    #[test]
    fn every_help_has_examples_and_the_parser_takes_each() {
        check(&Cli::command(), "eniup");
    }
}
