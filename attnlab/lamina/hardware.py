"""Devices as data: what the cost model needs to know of an accelerator."""

import os
from dataclasses import dataclass

from .catalogue import DATA, check_number, load, read


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        flops: dense bf16 FLOP/s.
        memory: bytes.
        bandwidth: of that memory, bytes/s.
        interconnect: to devices of its kind, bytes/s in one direction.
        network: to other machines, bytes/s in one direction.
        price: dollars per hour, or None where it is not known.
        source: where the figures are from.

    Raises:
        ValueError: naming the field.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    network: float
    price: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("flops", "memory", "bandwidth", "interconnect", "network"):
            check_number(f"Hardware {self.name}", field, getattr(self, field))
        if self.price is not None:
            check_number(f"Hardware {self.name}", "price", self.price, zero=True)


def load_hardware(name: str, path: str | os.PathLike[str] | None = None) -> Hardware:
    """A device by name, from the library's data or from a TOML file of the same form.

    Raises ValueError on an unknown name, with near matches, and on a file's bad field.
    """
    return load("load_hardware", Hardware, "hardware.toml", name, path)


def hardware_names() -> list[str]:
    """The devices in the library's data."""
    return list(read("hardware_names", DATA / "hardware.toml"))
