"""`python -m common.doctor`: checks packages, devices and limits, prints remedies, exits 1 if a run would fail."""

import argparse
import json
import os
import sys
from dataclasses import asdict

from common import errors
from common.doctor import machine, packages, probes
from common.doctor.all_reduce import check_all_reduce
from common.doctor.finding import Finding, verdict
from common.platforms import current, detect

OPERATIONS = ["matmul", "attention", "masked_attention", "collective"]


def diagnose(no_device: bool) -> list[Finding]:
    """The findings of all checks, in the order to fix them; `no_device` skips those that need a device."""
    platform = current()
    found = [machine.check_platform(platform), packages.check_python(), packages.check_needed(platform)]
    results = probes.run(["devices"] if no_device else ["devices", *OPERATIONS])
    works, result = results.pop("devices")
    found += packages.check_torch(platform, (works, result), no_device)
    found += packages.check_version_file(platform)
    found += packages.check_megatron(probes.run(["megatron"])["megatron"], no_device)
    found.append(packages.check_transformers(platform))
    extensions = {name: probes.run([name])[name] for name in packages.extensions()}
    found += packages.check_extensions(platform, extensions, no_device)
    found += machine.check_compiler(platform)
    if no_device:
        return found
    devices = [(name, free, total) for name, free, total in result["devices"]] if works else []
    found += machine.check_devices(platform, devices)
    if works and (devices or platform.device == "cpu"):
        found += machine.check_operations(results)
        if results["collective"][0]:  # otherwise that failure is reported already
            found.append(check_all_reduce(platform, len(devices)))
    return [
        *found,
        machine.check_shared_memory(platform),
        *machine.check_disk(),
        *machine.check_cgroup(),
        *machine.check_limits(platform),
    ]


def main() -> None:
    """Prints the findings and, last, the verdict; exits 1 if one of them is a failure."""
    parser = argparse.ArgumentParser(prog="python -m common.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of lines")
    parser.add_argument(
        "--no-device", action="store_true", help="skip the checks that need a device (for image builds)"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("KIT_PLATFORM", detect())
    found = diagnose(arguments.no_device)
    if arguments.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
    else:
        print(*found, "", verdict(found), sep="\n")
    sys.exit(any(each.status == "fail" for each in found))


if __name__ == "__main__":
    errors.run(main)
