//! Checks for other programs that configure links: managers, tools with the same job, container networks.

use std::collections::BTreeMap;

use super::{Facts, Finding, Findings, Placed};
use crate::config::Config;
use crate::container_network::{ContainerNetwork, container_network};
use crate::eni::Attached;
use crate::markers::{Files, Found};
use crate::net::{Link, Rule};
use crate::operation::Operation;
use crate::policy;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Networkd,
    NetworkManager,
    Ifupdown,
    Dhcpcd,
}

/// Who says of himself that he has configured the link.
fn owner_of(files: &Files, link: &Link) -> Option<Owner> {
    let has_line =
        |path: String, is_it: &dyn Fn(&str) -> bool| files.text(&path).is_some_and(|text| text.lines().any(is_it));
    // A link for which networkd has no .network file is `unmanaged` there, and has a file all the same.
    let is_configured = |line: &str| {
        ["configuring", "configured", "failed"].map(|s| format!("ADMIN_STATE={s}")).iter().any(|s| s == line)
    };
    if has_line(format!("/run/systemd/netif/links/{}", link.index), &is_configured) {
        return Some(Owner::Networkd);
    }
    if has_line(format!("/run/NetworkManager/devices/{}", link.index), &|line| line == "managed=true") {
        return Some(Owner::NetworkManager);
    }
    let is_up = |line: &str| line.split('=').next() == Some(&link.name);
    if ["/run/network/ifstate", "/run/ifstate"].iter().any(|path| has_line(path.to_string(), &is_up)) {
        return Some(Owner::Ifupdown);
    }
    let of_link = [format!("/run/dhcpcd/{}.pid", link.name), format!("/run/dhcpcd-{}.pid", link.name)];
    let of_all = ["/run/dhcpcd/pid", "/run/dhcpcd.pid"];
    let is_dhcpcd = of_link.iter().any(|path| files.has(path)) || of_all.iter().any(|path| files.has(path));
    is_dhcpcd.then_some(Owner::Dhcpcd)
}

impl Owner {
    fn name(self) -> &'static str {
        match self {
            Owner::Networkd => "systemd-networkd",
            Owner::NetworkManager => "NetworkManager",
            Owner::Ifupdown => "ifupdown",
            Owner::Dhcpcd => "dhcpcd",
        }
    }

    /// The line that takes a link away from him.
    fn keep_off(self, link: &Link) -> String {
        let (name, mac) = (&link.name, link.mac.map(|mac| mac.to_string()).unwrap_or_default());
        match self {
            Owner::Networkd => format!(
                "printf '[Match]\\nMACAddress={mac}\\n[Link]\\nUnmanaged=yes\\n' | \
                 sudo tee /etc/systemd/network/05-eniup-{name}.network && sudo networkctl reload"
            ),
            Owner::NetworkManager => format!(
                "printf '[keyfile]\\nunmanaged-devices+=mac:{mac}\\n' | \
                 sudo tee /etc/NetworkManager/conf.d/eniup-{name}.conf && sudo systemctl reload NetworkManager && \
                 sudo nmcli device set {name} managed no"
            ),
            Owner::Ifupdown => format!("take `auto {name}` and `iface {name}` out of /etc/network/interfaces"),
            Owner::Dhcpcd => {
                format!("echo 'denyinterfaces {name}' | sudo tee -a /etc/dhcpcd.conf, and restart dhcpcd")
            }
        }
    }
}

/// How to have the primary's first address asked for again; it is the distribution's to give.
pub fn renew(facts: &Facts, link: &Link) -> String {
    let name = &link.name;
    match owner_of(&facts.snapshot.files, link) {
        Some(Owner::Networkd) => format!("sudo networkctl renew {name}"),
        Some(Owner::NetworkManager) => format!("sudo nmcli device connect {name}"),
        Some(Owner::Ifupdown) => format!("sudo ifup --force {name}"),
        Some(Owner::Dhcpcd) => format!("sudo dhcpcd -n {name}"),
        None => format!("have the distribution's DHCP client configure {name}: eniup leaves that to it"),
    }
}

/// How to keep a link's manager from adding a default route again.
pub fn keep_off_default(facts: &Facts, link: &Link) -> String {
    match owner_of(&facts.snapshot.files, link) {
        Some(owner) => format!("and, that {} does not add it again, {}", owner.name(), owner.keep_off(link)),
        None => "and take it out of the configuration that added it".into(),
    }
}

pub fn manager(facts: &Facts) -> Findings {
    let files = &facts.snapshot.files;
    let mut findings: Vec<Finding> = deleting_networkd(facts).into_iter().collect();
    let secondaries = match facts.secondaries() {
        Err(why) if findings.is_empty() => return Err(why),
        secondaries => secondaries.unwrap_or_default(),
    };
    for Placed { eni, link, .. } in secondaries {
        if let Some(owner) = owner_of(files, link) {
            let evidence = format!("{} manages {}, the link of {}, as well", owner.name(), link.name, eni.id);
            findings.push(Finding::warn(evidence, owner.keep_off(link)));
        }
    }
    Ok(findings)
}

/// networkd that deletes what is not its own, on a machine where eniup has or may have something to lose.
fn deleting_networkd(facts: &Facts) -> Option<Finding> {
    let files = &facts.snapshot.files;
    let is_networkd = |link: &&Link| owner_of(files, link) == Some(Owner::Networkd);
    let link = facts.observed.links.values().find(is_networkd)?;
    let is_alone = facts.metadata().is_ok_and(|metadata| {
        let Attached { ready, pending, .. } = &metadata.attached;
        ready.len() + pending.len() < 2
    });
    let has_rules = facts.observed.rules.iter().any(|rule| policy::owns_rule(facts.config, rule));
    if NetworkdConf::of(files).spares_others() || is_alone && !has_rules {
        return None;
    }
    let evidence = format!(
        "systemd-networkd, which manages {}, deletes routes and rules that are not its own when it restarts or reloads",
        link.name
    );
    let fix = "sudo mkdir -p /etc/systemd/networkd.conf.d && \
               printf '[Network]\\nManageForeignRoutes=no\\nManageForeignRoutingPolicyRules=no\\n' | \
               sudo tee /etc/systemd/networkd.conf.d/zz-eniup.conf && sudo systemctl restart systemd-networkd";
    Some(Finding::warn(evidence, fix))
}

/// Where drop-ins of networkd.conf(5) are, each folder overriding those before it.
const NETWORKD_DROP_INS: [&str; 4] = [
    "/usr/lib/systemd/networkd.conf.d",
    "/usr/local/lib/systemd/networkd.conf.d",
    "/run/systemd/networkd.conf.d",
    "/etc/systemd/networkd.conf.d",
];

/// What networkd.conf(5) says of routes and rules that are not networkd's.
struct NetworkdConf {
    settings: BTreeMap<String, String>,
}

impl NetworkdConf {
    /// Drop-ins come after the main file in the order of their names, whatever folder they are in; of two with one name the
    /// one in the later folder counts.
    fn of(files: &Files) -> NetworkdConf {
        let mut drop_ins: BTreeMap<&str, &Found> = BTreeMap::new();
        for folder in NETWORKD_DROP_INS {
            drop_ins.extend(files.paths_in(folder));
        }
        let main = files.text("/etc/systemd/networkd.conf");
        let texts = main.into_iter().chain(drop_ins.values().filter_map(|found| match found {
            Found::Text(text) => Some(text.as_str()),
            Found::There | Found::Masked | Found::Unreadable(_) => None,
        }));
        let assignments = texts.flat_map(str::lines).map(str::trim).filter(|line| !line.starts_with(['#', ';']));
        let settings = assignments.filter_map(|line| line.split_once('='));
        NetworkdConf {
            settings: settings.map(|(key, value)| (key.trim().into(), value.trim().to_lowercase())).collect(),
        }
    }

    fn spares_others(&self) -> bool {
        let is_no = |key: &str| {
            self.settings.get(key).is_some_and(|value| ["no", "false", "off", "0", "n", "f"].contains(&value.as_str()))
        };
        is_no("ManageForeignRoutes") && is_no("ManageForeignRoutingPolicyRules")
    }
}

/// A tool with the same job.
struct Rival {
    name: &'static str,
    /// The file that shows that it is active.
    sign: fn(&Files) -> Option<String>,
    off: &'static str,
    /// Whether a rule that is not ours looks like one of its.
    made: fn(&Rule) -> bool,
}

const RIVALS: [Rival; 4] = [
    Rival {
        name: "amazon-ec2-net-utils",
        sign: net_utils,
        off: "sudo ln -sf /dev/null /etc/udev/rules.d/99-vpc-policy-routes.rules && sudo udevadm control --reload && \
              sudo systemctl stop 'refresh-policy-routes@*.timer' 'policy-routes@*.service'",
        made: |rule| (10_000..14_000).contains(&rule.table),
    },
    Rival {
        name: "nm-cloud-setup",
        sign: nm_cloud_setup,
        off: "sudo systemctl disable --now nm-cloud-setup.timer nm-cloud-setup.service",
        made: |rule| (30_200..30_500).contains(&rule.table),
    },
    Rival {
        name: "cloud-init's hotplug",
        sign: cloud_init,
        off: "echo 'updates: {network: {when: []}}' | sudo tee /etc/cloud/cloud.cfg.d/99-eniup.cfg && \
              sudo rm /etc/udev/rules.d/*-cloud-init-hook-hotplug.rules",
        made: |rule| (101..200).contains(&rule.table) && !is_of_cloud_netconfig(rule),
    },
    Rival {
        name: "cloud-netconfig",
        sign: cloud_netconfig,
        off: "sudo systemctl disable --now cloud-netconfig.timer && \
              sudo ln -sf /dev/null /etc/udev/rules.d/51-cloud-netconfig-hotplug.rules",
        made: is_of_cloud_netconfig,
    },
];

/// Table 10n for a link whose name ends in n, and priorities from a hundred times that on (`get_free_priority`).
fn is_of_cloud_netconfig(rule: &Rule) -> bool {
    (100..110).contains(&rule.table) && rule.priority / 100 == rule.table
}

/// A file in /etc/udev/rules.d stands before one of its name in /usr/lib, also if it masks it.
fn udev_rule(files: &Files, name: &str) -> Option<String> {
    let [ours, packaged] = ["/etc", "/usr/lib"].map(|root| format!("{root}/udev/rules.d/{name}"));
    if files.is_masked(&ours) { None } else { [ours, packaged].into_iter().find(|path| files.has(path)) }
}

fn net_utils(files: &Files) -> Option<String> {
    let names = ["99-vpc-policy-routes.rules", "53-ec2-network-interfaces.rules"];
    names.iter().find_map(|name| udev_rule(files, name))
}

/// It does nothing unless it is told that this is EC2.
fn nm_cloud_setup(files: &Files) -> Option<String> {
    let folders = ["/usr/lib/systemd/system/nm-cloud-setup.service.d", "/etc/systemd/system/nm-cloud-setup.service.d"];
    let mut texts = folders.iter().flat_map(|folder| files.texts_in(folder));
    let is_ec2 = texts
        .any(|(_, text)| text.lines().any(|line| !line.starts_with('#') && line.contains("NM_CLOUD_SETUP_EC2=yes")));
    let enabled = files.first("/etc/systemd/system/*.wants/nm-cloud-setup.*")?;
    let unit = enabled.rsplit('/').next()?;
    let is_masked = files.is_masked(&format!("/etc/systemd/system/{unit}"));
    (is_ec2 && !is_masked).then(|| enabled.into())
}

fn cloud_init(files: &Files) -> Option<String> {
    let names = ["90-cloud-init-hook-hotplug.rules", "10-cloud-init-hook-hotplug.rules"];
    names.iter().find_map(|name| udev_rule(files, name))
}

fn cloud_netconfig(files: &Files) -> Option<String> {
    let timer = || files.first("/etc/systemd/system/*.wants/cloud-netconfig.timer").map(String::from);
    udev_rule(files, "51-cloud-netconfig-hotplug.rules").or_else(timer)
}

pub fn rival(facts: &Facts) -> Findings {
    let files = &facts.snapshot.files;
    let has_cni = network(facts).is_some();
    let mut findings = Vec::new();
    for Rival { name, sign, off, made } in RIVALS {
        if let Some(path) = sign(files) {
            findings.push(Finding::fail(format!("{name} is active ({path}) and configures the same ENIs"), off));
            continue;
        }
        // A container network has its rules and tables in the same places.
        let is_its = |rule: &&Rule| rule.from.is_some() && !policy::owns_rule(facts.config, rule) && made(rule);
        let left: Vec<&Rule> = facts.observed.rules.iter().filter(is_its).filter(|_| !has_cni).collect();
        if let Some(first) = left.first() {
            let delete = |rule: &&Rule| format!("sudo {}", Operation::DeleteRule { rule: (*rule).clone() });
            let evidence = format!(
                "{} by which {name} sends traffic to tables of its own, the first to table {}",
                if left.len() == 1 {
                    "there is a rule left".into()
                } else {
                    format!("there are {} rules left", left.len())
                },
                first.table
            );
            findings.push(Finding::warn(evidence, left.iter().map(delete).collect::<Vec<_>>().join("\n")));
        }
    }
    Ok(findings)
}

fn network(facts: &Facts) -> Option<ContainerNetwork> {
    container_network(&facts.snapshot.files, &facts.observed)
}

pub fn cni(facts: &Facts) -> Findings {
    let Config { manage, ignore, enis, .. } = facts.config;
    let is_chosen = enis.iter().any(|(_, choices)| choices.unmanaged.is_some());
    let is_configured = !manage.is_empty() || !ignore.is_empty() || is_chosen;
    let Some(ContainerNetwork { name, sign }) = network(facts).filter(|_| !is_configured) else {
        return Ok(Vec::new());
    };
    let primary = facts.primary().ok().flatten().map_or("eni-…", |placed| &placed.eni.id);
    let evidence =
        format!("{name} is here ({sign}) and may have ENIs of its own; eniup leaves all but {primary} alone");
    let fix = format!(
        "sudo mkdir -p /etc/eniup/config.d && printf '[[manage]]\\nid = \"{primary}\"\\n' | \
         sudo tee /etc/eniup/config.d/cni.toml, and more of these for your own ENIs"
    );
    Ok(vec![Finding::warn(evidence, fix)])
}
