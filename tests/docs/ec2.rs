//! The VPC in which the documentation's commands are tried, and as much of `aws ec2` as they use, carried out in it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Output;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use ipnet::IpNet;
use tempfile::TempDir;
use vpc_lab::lab::{Distribution, Lab};
use vpc_lab::vpc::{CreateEni, EniId};

use crate::tools;

const ENIUP: &str = env!("CARGO_BIN_EXE_eniup");

/// How long a block may take.
const PATIENCE: &str = "60";

/// Its standard input is the way to the lab and back.
const AWS: &str = r#"#!/bin/sh
printf '%s\n' "$*" >&0
IFS= read -r answer
case $answer in
    "ok "*) printf '%s' "${answer#ok }" ;;
    *) printf '%s\n' "$answer" >&2; exit 254 ;;
esac
"#;

/// An instance `web`: 10.0.0.10 and 10.0.0.11 on its primary ENI (ens5); 10.0.1.20, 10.0.1.21, 2600:1f16:67f:f201::20 and the prefix
/// 10.0.1.64/28 on the second (ens6); a container on docker0 (172.17.0.2) and one with a delegated address (10.0.1.65). An instance
/// `standby` with two ENIs in the same subnets (10.0.0.50, 10.0.1.50). A client at 10.0.2.30, and a host of the internet. The
/// distribution configures primary ENIs alone. For scripts `$me` is the id of their instance, `$eni` that of its second ENI,
/// and `$spare` that of one which is not attached (10.0.1.40).
pub struct Ec2 {
    lab: Lab,
    programs: TempDir,
    spare: EniId,
}

impl Ec2 {
    pub fn build() -> Result<Ec2> {
        // Of the lab before: an instance of the same name has the same `/run`.
        if Path::new("/run/nodes").exists() {
            fs::remove_dir_all("/run/nodes")?;
        }
        let mut lab = Lab::new(ENIUP)?;
        let subnets = lab.fabric.world(|world| -> Result<Vec<String>> {
            let vpc = world.create_vpc(&["10.0.0.0/16".parse()?, "2600:1f16:67f:f200::/56".parse()?]);
            let subnet = |n: u8| {
                let ipv6 = format!("2600:1f16:67f:f20{n}::/64").parse()?;
                world.create_subnet(&vpc, Some(format!("10.0.{n}.0/24").parse()?), &[ipv6])
            };
            (0..3u8).map(subnet).collect()
        })?;
        let eni = |n: usize, hosts: &[u8]| -> Result<CreateEni> {
            Ok(CreateEni {
                subnet: subnets[n].clone(),
                ipv4s: hosts.iter().map(|host| Ipv4Addr::new(10, 0, n as u8, *host)).collect(),
                ipv6s: vec![format!("2600:1f16:67f:f20{n}::{}", hosts[0]).parse()?],
                ..CreateEni::default()
            })
        };
        let second = CreateEni { ipv4_prefixes: vec!["10.0.1.64/28".parse()?], ..eni(1, &[20, 21])? };
        let web = [lab.create_network_interface(eni(0, &[10, 11])?)?, lab.create_network_interface(second)?];
        let standby = [eni(0, &[50])?, eni(1, &[50])?];
        let standby =
            standby.map(|create| lab.create_network_interface(create)).into_iter().collect::<Result<Vec<_>>>()?;
        let spare = lab.create_network_interface(eni(1, &[40])?)?;
        let client = lab.create_network_interface(eni(2, &[30])?)?;
        for (eni, private) in [(&web[0], None), (&web[1], None), (&web[1], Some(Ipv4Addr::new(10, 0, 1, 21)))] {
            lab.elastic_ip(eni, private)?;
        }
        lab.run_instance("web", &web, "m7i.large", Distribution::Primary)?;
        lab.run_instance("standby", &standby, "m7i.large", Distribution::Primary)?;
        lab.run_instance("client", &[client], "t3.micro", Distribution::Primary)?;
        lab.add_internet_host("internet", Some(Ipv4Addr::new(198, 51, 100, 7)), None)?;
        lab.add_container("docker", "web", "docker0", &["172.17.0.2/16".parse()?])?;
        lab.add_pod("pod", "web", &[IpAddr::from([10, 0, 1, 65])])?;
        Ok(Ec2 { lab, programs: programs()?, spare })
    }

    /// Runs a script on an instance, as root and up to its first command that fails.
    pub fn run(&mut self, node: &str, script: &str) -> Result<Output> {
        let (ours, its) = UnixStream::pair()?;
        let file = self.programs.path().join("script");
        fs::write(&file, script)?;
        let instance = self.lab.instances().find(|(name, _)| *name == node).context("no such instance")?.1.to_string();
        let folders = std::env::split_paths(tools::path());
        let path = std::env::join_paths(std::iter::once(self.programs.path().to_path_buf()).chain(folders))?;
        let mut command = self.lab.command(node, "timeout")?;
        command.args([PATIENCE, "sh", "-eu"]).arg(&file).stdin(OwnedFd::from(its)).current_dir(self.programs.path());
        command.env("PATH", path).env("eni", self.second(&instance)).env("me", instance).env("spare", &self.spare);
        command.env_remove("AWS_EC2_METADATA_SERVICE_ENDPOINT").env_remove("RUNTIME_DIRECTORY");
        std::thread::scope(|scope| {
            let script = scope.spawn(move || command.output().context("running a shell"));
            let mut answers = ours.try_clone()?;
            // Until the script and all that it has started have ended.
            for request in BufReader::new(ours).lines() {
                match self.aws(&request?) {
                    Ok(answer) => writeln!(answers, "ok {answer}")?,
                    Err(error) => writeln!(answers, "{}", format!("{error:#}").replace('\n', " "))?,
                }
            }
            script.join().map_err(|_| anyhow::anyhow!("the script's thread panicked"))?
        })
    }

    /// Nothing where there is one alone.
    fn second(&self, instance: &str) -> EniId {
        let world = self.lab.world();
        let enis = world.enis_of(instance);
        let second = enis.iter().find(|eni| eni.attachment.as_ref().is_some_and(|at| at.device_number == 1));
        second.map(|eni| eni.id.clone()).unwrap_or_default()
    }

    fn aws(&mut self, request: &str) -> Result<String> {
        let aws = Aws::try_parse_from(request.split_whitespace())?;
        let (eni, sources) = (&aws.network_interface_id, aws.sources());
        match aws.words[1].as_str() {
            "assign-private-ip-addresses" | "assign-ipv6-addresses" => {
                self.lab.assign(eni, &sources, aws.allow_reassignment)?;
            }
            "unassign-private-ip-addresses" | "unassign-ipv6-addresses" => self.lab.unassign(eni, &sources)?,
            "attach-network-interface" => {
                let name =
                    self.lab.instances().find(|(_, id)| *id == aws.instance_id).map(|(name, _)| name.to_string());
                self.lab.attach_network_interface(eni, &name.context("no such instance")?, 0, aws.device_index)?;
            }
            "detach-network-interface" => {
                self.lab.detach_network_interface(&aws.attachment_id.replace("eni-attach-", "eni-"))?;
            }
            "modify-network-interface-attribute" => {
                self.lab.fabric.world(|world| world.modify_source_dest_check(eni, !aws.no_source_dest_check))?;
            }
            "describe-network-interfaces" => {
                let attachment = "NetworkInterfaces[0].Attachment.AttachmentId";
                ensure!(aws.query.as_deref() == Some(attachment), "the lab knows --query {attachment} alone");
                let is_attached = self.lab.world().eni(eni)?.attachment.is_some();
                return Ok(if is_attached { eni.replace("eni-", "eni-attach-") } else { "None".into() });
            }
            // Nothing takes time here.
            "wait" => {}
            other => bail!("the lab knows no {other}"),
        }
        Ok(String::new())
    }
}

/// `eniup`, `aws` and `sudo`.
fn programs() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    symlink(ENIUP, folder.path().join("eniup"))?;
    install(folder.path(), "aws", AWS)?;
    install(folder.path(), "sudo", "#!/bin/sh\nexec \"$@\"\n")?;
    Ok(folder)
}

fn install(folder: &Path, name: &str, text: &str) -> Result<()> {
    let file = folder.join(name);
    fs::write(&file, text)?;
    Ok(fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?)
}

/// The words behind `aws`.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Aws {
    /// `ec2` and what to do; behind `wait`, for what.
    #[arg(required = true, num_args = 2..=3)]
    words: Vec<String>,
    #[arg(long, alias = "network-interface-ids", default_value = "")]
    network_interface_id: EniId,
    #[arg(long, num_args = 1..)]
    private_ip_addresses: Vec<IpAddr>,
    #[arg(long, num_args = 1..)]
    ipv6_addresses: Vec<IpAddr>,
    #[arg(long, num_args = 1..)]
    ipv4_prefixes: Vec<IpNet>,
    #[arg(long)]
    allow_reassignment: bool,
    #[arg(long, default_value = "")]
    instance_id: String,
    #[arg(long, default_value_t = 1)]
    device_index: u32,
    #[arg(long, default_value = "")]
    attachment_id: String,
    #[arg(long)]
    force: bool,
    #[arg(long)]
    no_source_dest_check: bool,
    #[arg(long)]
    query: Option<String>,
    #[arg(long)]
    output: Option<String>,
}

impl Aws {
    fn sources(&self) -> Vec<IpNet> {
        let addresses = self.private_ip_addresses.iter().chain(&self.ipv6_addresses);
        addresses.map(|address| IpNet::from(*address)).chain(self.ipv4_prefixes.iter().copied()).collect()
    }
}
