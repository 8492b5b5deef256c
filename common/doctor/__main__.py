"""`python -m common.doctor`: checks packages, devices and limits, prints remedies, exits 1 if a run would fail."""

import argparse
import json
import os
import sys
from dataclasses import asdict

from common import errors
from common.doctor import machine, packages, probes
from common.doctor.all_reduce import look_at_all_reduce
from common.doctor.finding import Finding
from common.platforms import current, detect

OPERATIONS = ["matmul", "attention", "masked_attention", "collective"]


def look(no_device: bool) -> list[Finding]:
    """Everything, in the order in which one would mend it; `no_device` leaves out what an image's build has not."""
    platform = current()
    found = [machine.look_at_platform(platform), packages.look_at_python(), packages.look_at_needed(platform)]
    done = probes.run(["devices"] if no_device else ["devices", *OPERATIONS])
    works, said = done.pop("devices")
    found += packages.look_at_torch(platform, (works, said), no_device)
    found += packages.look_at_megatron(probes.run(["megatron"])["megatron"], no_device)
    found.append(packages.look_at_transformers(platform))
    extensions = {name: probes.run([name])[name] for name in packages.extensions()}
    found += packages.look_at_extensions(platform, extensions, no_device)
    found += machine.look_at_compiler(platform)
    if no_device:
        return found
    devices = [(name, free, total) for name, free, total in said["devices"]] if works else []
    found += machine.look_at_devices(platform, devices)
    if works and (devices or platform.device == "cpu"):
        found += machine.look_at_operations(done)
        if done["collective"][0]:  # else its own failure is reported
            found.append(look_at_all_reduce(platform, len(devices)))
    return [*found, machine.look_at_shared_memory(), *machine.look_at_disk(), *machine.look_at_limits(platform)]


def main() -> None:
    """Prints the findings; exits 1 where one of them is a failure."""
    parser = argparse.ArgumentParser(prog="python -m common.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of lines")
    parser.add_argument("--no-device", action="store_true", help="leave out what an image that is being built has not")
    arguments = parser.parse_args()
    os.environ.setdefault("KIT_PLATFORM", detect())
    found = look(arguments.no_device)
    if arguments.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        print(*found, sep="\n")
    sys.exit(any(each.status == "fail" for each in found))


if __name__ == "__main__":
    errors.run(main)
