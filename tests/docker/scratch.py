"""Builds a Dockerfile without a container engine: its steps really run, in a copy-on-write root over this machine.

The root is an overlay in a mount namespace of its own, so nothing outside changes and all is gone afterwards. It takes
ARG, FROM ... AS, SHELL, USER, ENV, WORKDIR, COPY --chown and RUN --mount=type=bind,from=; the base image is this
machine with `prepare` done to it. Needs root.
"""

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.docker.images import ROOT, context_files, environment, instructions

CLEAN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
MOUNTS = """
mount -t tmpfs tmpfs "$1"
root() { # NAME: an own root, writable, over this machine's
  mkdir -p "$work/$1"/{upper,inner,root}
  mount -t overlay overlay -o "lowerdir=/,upperdir=$work/$1/upper,workdir=$work/$1/inner" "$work/$1/root"
  for each in proc dev sys; do mount --rbind "/$each" "$work/$1/root/$each"; done
  mkdir -p "$work/$1/root/tmp" "$work/$1/root/workspace"
}
work=$1
"""


def possible() -> bool:
    """Whether this machine permits such a root."""
    script = "mkdir /mnt/{u,w,r}; mount -t overlay o -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r"
    command = ["unshare", "--mount", "bash", "-ec", f"mount -t tmpfs t /mnt; {script}"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


class Build:
    """The shell script that carries a Dockerfile out, put together instruction by instruction."""

    def __init__(self, context: Path, given: dict[str, str]) -> None:
        self.context, self.given = context, given
        self.script = [MOUNTS]
        self.stage = ""
        self.arguments: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        self.shell: list[str] = []
        self.user, self.folder = "0:0", "/"

    def expand(self, text: str) -> str:
        for name, value in {**self.arguments, **self.environment}.items():
            text = text.replace(f"${{{name}}}", value)
        return text

    def enter(self, stage: str, base: dict[str, str], prepare: str) -> None:
        """Begins a stage on the base image."""
        self.stage, self.environment, self.shell = stage, {**CLEAN, **base}, ["/bin/sh", "-c"]
        self.user, self.folder = "0:0", "/"
        root = f"$work/{stage}/root"
        self.script.append(f"root {stage}\ncp -r {self.context.parent}/base {root}/base")
        self.script.append(f"chroot {root} env -i {self._words()} bash -euc {shlex.quote(prepare)}")

    def _words(self) -> str:
        both = {**self.arguments, **self.environment}
        return " ".join(shlex.quote(f"{name}={value}") for name, value in both.items())

    def run(self, command: str, flags: tuple[str, ...] = ()) -> None:
        """Runs `command` as the image would: in its folder, as its user, in its shell."""
        root = f"$work/{self.stage}/root"
        mounted = [dict(part.split("=", 1) for part in flag[len("--mount=") :].split(",")) for flag in flags]
        for each in mounted:
            assert each["type"] == "bind"
            self.script.append(f"mkdir -p {root}{each['target']}")
            self.script.append(f"mount --bind $work/{each['from']}/root{each['source']} {root}{each['target']}")
        words = " ".join(shlex.quote(word) for word in [*self.shell, command])
        self.script.append(
            f"chroot --userspec={self.user} {root} env -C {shlex.quote(self.folder)} -i {self._words()} {words}"
        )
        for each in mounted:
            self.script.append(f"umount {root}{each['target']}")

    def copy(self, sources: list[str], target: str, owner: str) -> None:
        """Copies from the context; a target that ends in / or is a folder takes the sources into itself."""
        where = target if target.startswith("/") else f"{self.folder}/{target}"
        place = f"$work/{self.stage}/root{where}"
        self.script.append(f"mkdir -p {place}")
        for source in sources:
            inside = f"{self.context}/{source}" + ("/." if (ROOT / source).is_dir() else "")
            self.script.append(f"cp -r --preserve=mode {inside} {place}")
        if owner:
            self.script.append(f"chown -R {owner} {place}")


def send_context(folder: Path) -> Path:
    """A copy of what `docker build .` would send."""
    for name in context_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def build(
    path: Path, folder: Path, given: dict[str, str], base: dict[str, str], prepare: str,
    skip: Callable[[str], bool] = lambda command: False, then: str = "true",
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """The run of all steps of the Dockerfile `path`, and of `then` as a container's command.

    given: --build-arg; base: the base image's environment; prepare: what makes this machine it, with FOLDER/base as
    /base; skip: the RUNs left out.
    """
    made = Build(send_context(folder / "context"), given)
    for each in instructions(path):
        kind, value = each.cmd.upper(), list(each.value)
        if kind == "ARG":
            for word in value:
                name, _, default = word.partition("=")
                made.arguments[name] = given.get(name, default or made.arguments.get(name, ""))
        elif kind == "FROM":
            made.enter(value[2] if len(value) == 3 else "final", base, prepare)
        elif kind == "SHELL":
            made.shell = value
        elif kind == "USER":
            made.user = made.expand(value[0])
        elif kind == "ENV":
            made.environment |= {name: made.expand(text) for name, text in zip(value[::2], value[1::2], strict=True)}
        elif kind == "WORKDIR":
            made.folder = made.expand(value[0])
            made.script.append(f"mkdir -p $work/{made.stage}/root{made.folder}")
        elif kind == "COPY":
            owner = next((flag.split("=", 1)[1] for flag in each.flags if flag.startswith("--chown=")), "")
            made.copy(value[:-1], made.expand(value[-1]), made.expand(owner))
        elif kind == "RUN" and not skip(value[0]):
            made.run(value[0], each.flags)
    made.run(then)
    script = folder / "build.sh"
    script.write_text("\n".join(made.script) + "\n")
    (folder / "work").mkdir()
    return subprocess.run(
        ["unshare", "--mount", "bash", "-euo", "pipefail", script, folder / "work"], env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
