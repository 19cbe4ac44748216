"""Versions of what the library builds on, and whether they were tested."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

_OURS = "distrifusion"


@dataclass(frozen=True)
class Package:
    """A package that distrifusion needs, or can use.

    Attributes:
        version: the installed one, None if there is none.
        tested: range of versions that this release is made for, as in pyproject.toml; empty if it says none.
        extra: name of the optional feature that needs it, None if everything does.
    """

    name: str
    version: str | None
    tested: str
    extra: str | None

    @property
    def fits(self) -> bool:
        """True if the installed version is in the range; what is optional may be missing."""
        if self.version is None:
            return self.extra is not None
        return SpecifierSet(self.tested).contains(Version(self.version), prereleases=True)

    @property
    def is_old(self) -> bool:
        """True if the installed version is below the range."""
        floors = [Version(part.version) for part in SpecifierSet(self.tested) if part.operator == ">="]
        return self.version is not None and any(Version(self.version) < floor for floor in floors)


def packages() -> tuple[Package, ...]:
    """Everything that distrifusion's metadata names, but what only its developers need; none if it is not installed."""
    found: dict[str, Package] = {}
    for text in (metadata.requires(_OURS) or ()) if installed(_OURS) else ():
        requirement = Requirement(text)
        extra = _extra(requirement)
        if extra == "dev" or requirement.name in (*found, _OURS):
            continue
        # The floor first.
        tested = ",".join(sorted(map(str, requirement.specifier), reverse=True))
        found[requirement.name] = Package(requirement.name, installed(requirement.name), tested, extra)
    return tuple(found.values())


def installed(name: str) -> str | None:
    """Version of an installed package, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """What a result depends on: Python, distrifusion and what it needs, by name."""
    needed = {package.name: package.version for package in packages() if package.version and not package.extra}
    return {"python": platform.python_version(), _OURS: installed(_OURS) or "not installed", **needed}


def _extra(requirement: Requirement) -> str | None:
    match = re.search(r"extra == ['\"]([^'\"]+)['\"]", str(requirement.marker or ""))
    return match[1] if match else None
