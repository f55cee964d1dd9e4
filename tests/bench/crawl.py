"""How cloud-init's own crawler reads instance metadata, beside `eniup plan` on the same instance; tests/bench/cloud-init runs it.

Prints one line of the table. A process of its own for each run, so that both begin from nothing.
"""

import resource
import statistics
import subprocess
import sys
import time

RUNS = 7
METADATA = "http://169.254.169.254"


def crawl():
    """Reads all that cloud-init reads of metadata and prints how many ENIs there are and how many requests it took."""
    import requests

    requests_sent = 0
    send = requests.Session.send

    def counted(*arguments, **options):
        nonlocal requests_sent
        requests_sent += 1
        return send(*arguments, **options)

    requests.Session.send = counted
    from cloudinit import url_helper
    from cloudinit.sources.helpers import ec2

    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
    token = url_helper.readurl(METADATA + "/latest/api/token", headers=lifetime, request_method="PUT")
    headers = {"X-aws-ec2-metadata-token": token.contents.decode()}
    tree = ec2.get_instance_metadata(
        "latest", METADATA, headers_cb=lambda _: headers, headers_redact=list(headers)
    )
    print(len(tree["network"]["interfaces"]["macs"]), requests_sent)


def cpu_of_children():
    """Seconds of those that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(command):
    """The medians of wall and CPU time in milliseconds, and what the last run printed."""
    walls, cpus, said = [], [], ""
    for _ in range(RUNS):
        begun, before = time.monotonic(), cpu_of_children()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        walls.append((time.monotonic() - begun) * 1000)
        cpus.append((cpu_of_children() - before) * 1000)
    return statistics.median(walls), statistics.median(cpus), said


def main():
    if sys.argv[1:] == ["--crawl"]:
        return crawl()
    eniup = sys.argv[1]
    wall, cpu, said = measure([sys.executable, __file__, "--crawl"])
    enis, requests_sent = said.split()
    own_wall, own_cpu, _ = measure([eniup, "plan", "--quiet"])
    row = [enis, requests_sent, f"{wall:.0f}", f"{cpu:.0f}", f"{own_wall:.1f}", f"{own_cpu:.0f}", f"{wall / own_wall:.0f}"]
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
