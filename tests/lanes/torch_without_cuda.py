"""Makes a CUDA build of torch work without NVIDIA's gigabytes: `python torch_without_cuda.py`, after pip's --no-deps.

Installs what else torch needs, CUDA's runtime among it, which torch's own libraries call as they are loaded. Each other
library that they name and the loader does not find gets a stub beside them, made by `cc`, whose functions end the
process when they are called: nothing on a CPU calls them.
"""

import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")
UNDEFINED = re.compile(r" UND (\w+)(?:@(\S+))?")
VERSIONS_OF = re.compile(r"File: (\S+)  Cnt: \d+((?:\n.*Name: .*)*)")
VERSION = re.compile(r"Name: (\S+)")
DRIVER = "libcuda.so.1"  # without it torch sees no GPU, as it should


def run(*command: str) -> str:
    """The stdout of a command."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def requirements(torch_requires: list[str]) -> list[str]:
    """Those of torch's own requirements that it cannot be imported without."""
    needed = []
    for line in torch_requires:
        name = re.split(r"[^\w-]", line)[0]
        if "extra ==" in line:
            continue
        if name == "cuda-toolkit":  # from torch 2.11 on
            needed.append(re.sub(r"\[.*\]", "[cudart]", line))
        elif name.startswith("nvidia-cuda-runtime") or not name.startswith(("nvidia-", "cuda-", "triton")):
            needed.append(line)
    return needed


def missing_libraries(files: list[Path]) -> set[str]:
    """The names that `files` need and the loader does not find."""
    found = [line.split() for path in files for line in run("ldd", str(path)).splitlines()]
    return {words[0] for words in found if words[-2:] == ["not", "found"]}


def needed_symbols(files: list[Path], library: str) -> dict[str, set[str]]:
    """What `files` take from `library`, by version; without one ("") the names that begin with the library's own."""
    stem = library.removeprefix("lib").partition(".")[0].partition("_")[0].lower()
    symbols: dict[str, set[str]] = {"": set()}
    for path in files:
        if library not in NEEDED.findall(run("readelf", "-dW", str(path))):
            continue
        versions = VERSIONS_OF.findall(run("readelf", "-VW", str(path)))
        mine = {name for file, names in versions if file == library for name in VERSION.findall(names)}
        symbols |= {version: symbols.get(version, set()) for version in mine}
        for name, version in UNDEFINED.findall(run("readelf", "--dyn-syms", "-W", str(path))):
            if version in mine or (not version and name.lower().startswith(stem)):
                symbols[version].add(name)
    return symbols


def make_stub(folder: Path, library: str, symbols: dict[str, set[str]]) -> None:
    """Writes `folder/library`."""
    lines = ["void missing_symbol(void) { __builtin_trap(); }"]
    names = sorted(set().union(*symbols.values()))
    lines += [f'void {name}(void) __attribute__((alias("missing_symbol")));' for name in names]
    source, versions = folder / f"{library}.c", folder / f"{library}.map"
    source.write_text("\n".join(lines) + "\n")
    parts = [
        f"{version} {{ {''.join(f'{name}; ' for name in sorted(symbols[version]))}}};\n"
        for version in symbols
        if version
    ]
    versions.write_text("".join(parts))
    flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library}"]
    flags += [f"-Wl,--version-script={versions}"] if parts else []
    run("cc", *flags, "-o", str(folder / library), str(source))
    source.unlink()
    versions.unlink()


def main() -> None:
    """Installs, then makes what is missing."""
    run(sys.executable, "-m", "pip", "install", "--quiet", *requirements(metadata.requires("torch") or []))
    spec = find_spec("torch")
    assert spec and spec.origin
    folder = Path(spec.origin).parent / "lib"
    files = [path for path in folder.glob("*.so*") if not path.is_symlink()]
    missing = sorted(missing_libraries(files) - {DRIVER})
    for library in missing:
        make_stub(folder, library, needed_symbols(files, library))
    print(f"torch_without_cuda.py: {len(missing)} stubs: {' '.join(missing)}")


if __name__ == "__main__":
    main()
