"""Check what `make dist` built: a wheel and an sdist of this version, each with what it needs and nothing private.

python tests/check_dist.py dist
"""

import email
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_SDIST = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "mkdocs.yml", "docs/index.md")
NEVER = (".venv", "__pycache__", "benchmarks/results", "runs/", "site/")


def contents_of_wheel(path):
    """Return the names in a wheel and its metadata."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        assert wheel.testzip() is None, f"{path}: a damaged file"
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return names, email.message_from_bytes(wheel.read(metadata))


def check_wheel(path, version):
    names, metadata = contents_of_wheel(path)
    sources = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src").rglob("*.py")}
    assert sources <= set(names), f"{path} lacks {sorted(sources - set(names))}"
    strangers = [name for name in names if not name.startswith(("lockstep/", "lockstep_moe-"))]
    assert not strangers, f"{path} has {strangers}"
    assert (metadata["Name"], metadata["Version"]) == ("lockstep-moe", version), metadata
    assert metadata["License-Expression"] == "Apache-2.0", metadata
    assert metadata["Description-Content-Type"] == "text/markdown", metadata
    return names


def check_sdist(path, version):
    """Check the sdist, and that the wheel built from it has the files of the wheel built from the clone."""
    with tarfile.open(path) as sdist, tempfile.TemporaryDirectory() as folder:
        names = [name.partition("/")[2] for name in sdist.getnames()]
        assert set(IN_SDIST) <= set(names), f"{path} lacks {set(IN_SDIST) - set(names)}"
        unwanted = [name for name in names if any(part in name for part in NEVER)]
        assert not unwanted, f"{path} has {unwanted[:5]}"
        sdist.extractall(folder, filter="data")
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
        subprocess.run([*command, f"{folder}/lockstep_moe-{version}"], check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        return check_wheel(wheel, version)


def main():
    version = (ROOT / "src/lockstep/_version.py").read_text().split('"')[-2]
    (wheel,), (sdist,) = (list(Path(sys.argv[1]).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    assert sorted(check_wheel(wheel, version)) == sorted(check_sdist(sdist, version))
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(), "CITATION.cff has another version"
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(), "CHANGELOG.md has no chapter of this version"
    print(f"{wheel.name} ({wheel.stat().st_size:,} bytes), {sdist.name} ({sdist.stat().st_size:,} bytes): checked")


if __name__ == "__main__":
    main()
