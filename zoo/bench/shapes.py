"""What to measure: the words of `zoo bench op=...` as cases. No torch here."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zoo.errors import UsageError, remedy

__all__ = ["BACKENDS", "DTYPES", "SETS", "Case", "Request", "parse_request"]

BACKENDS = ("triton", "torch", "reference", "fla", "sdpa")
DTYPES = ("float64", "float32", "bfloat16", "float16")
OWN_KEYS = ("op", "shapes", "dtype", "backends", "device", "seed", "repeats", "out")

Sizes = Mapping[str, int]


def _sizes(B: int, T: int, H: int, K: int) -> dict[str, int]:
    return {"B": B, "T": T, "H": H, "K": K, "V": K}


# name -> (dtype, shapes). The small one is for two CPU cores, at two lengths so that growth can be read off.
SETS: Mapping[str, tuple[str, tuple[Sizes, ...]]] = {
    "cpu": ("float32", (_sizes(2, 2048, 4, 64), _sizes(2, 16384, 4, 64))),
    "fla": (  # the six shapes of flash-linear-attention's own table, then 32k tokens cut into three lengths
        "bfloat16",
        (
            _sizes(1, 8192, 96, 128),
            _sizes(2, 16384, 16, 128),
            _sizes(4, 2048, 16, 128),
            _sizes(4, 4096, 64, 128),
            _sizes(8, 1024, 8, 64),
            _sizes(8, 2048, 32, 256),
            _sizes(16, 2048, 16, 128),
            _sizes(4, 8192, 16, 128),
            _sizes(1, 32768, 16, 128),
        ),
    ),
}
# Without a set: one shape, by the kind of device.
DEFAULT = {"cpu": ("float32", _sizes(2, 2048, 4, 64)), "cuda": ("bfloat16", _sizes(4, 4096, 16, 128))}
# Sizes that a set does not speak of, or that mean something else for one operator.
OWN_SIZES: Mapping[str, Sizes] = {
    "causal_conv1d": {"W": 4},
    "depthwise_conv1d": {"W": 7},  # Hydra's
    "linear_cross_entropy": {"D": 512, "V": 50_000},
    "quasiseparable": {"P": 64, "G": 1, "N": 64},  # Hydra's
    "fft_convolution": {"L": 16384},
    "grid_scan": {"W": 16, "D": 64},  # T is rows; the loop that proves it goes cell by cell
    "s4": {"H": 256, "N": 32},  # channels, and half of the state
    "s4d": {"H": 256, "N": 32},
    "ssd": {"P": 64, "G": 1, "N": 128},  # Mamba-2's
    **{name: {"D": 64} for name in ("lstm", "gru", "elman", "slstm")},
}


@dataclass(frozen=True)
class Case:
    """One operator at one shape and dtype; `sizes` holds B, T and the operator's own."""

    operator: str
    sizes: Sizes
    dtype: str

    @property
    def label(self) -> str:
        """The case as a line of a table names it, as "delta_rule B=2 T=64 float32"."""
        return f"{self.operator} {' '.join(f'{key}={value}' for key, value in self.sizes.items())} {self.dtype}"


@dataclass(frozen=True)
class Request:
    """All that a run of the operators' benchmark needs to know.

    Attributes:
        cases: what to measure.
        backends: the sides to let compete; empty for all that make sense.
        device: "cpu", "cuda" or "cuda:N".
        repeats: rounds; slow sides sit out the later ones.
    """

    cases: tuple[Case, ...]
    backends: tuple[str, ...] = ()
    device: str = "cpu"
    seed: int = 0
    repeats: int = 10


def parse_request(settings: Sequence[str], known: Mapping[str, Sizes], device: str) -> Request:
    """Read key=value words.

    Args:
        settings: op=NAME (or op=all), sizes such as T=2048,16384, and the keys of OWN_KEYS.
        known: operator -> example sizes, which say which sizes it has.
        device: where to run unless device= says otherwise.

    Raises:
        UsageError: an unknown operator, key, set, dtype or backend, or a size that is no whole number.
    """
    words = _words(settings)
    operators = _operators(words.pop("op", ""), known)
    own = {key: words.pop(key) for key in OWN_KEYS if key in words}
    size_keys = {"B", "T"}.union(*(known[name] for name in operators))
    for key in words:
        if key not in size_keys:
            keys = [*sorted(size_keys), *OWN_KEYS]
            otherwise = f"it takes {', '.join(keys)}"
            raise UsageError(f"zoo bench op= has no setting {key!r}{remedy(key, keys, otherwise)}")
    asked = {key: [_whole(key, part) for part in value.split(",")] for key, value in words.items()}
    device = own.get("device", device)
    dtype, shapes = _shapes(own.get("shapes"), device)
    dtypes = [_one_of("dtype", name, DTYPES) for name in own.get("dtype", dtype).split(",")]
    cases: list[Case] = []
    for name in operators:
        for shape, chosen in itertools.product(shapes, dtypes):
            for values in itertools.product(*asked.values()):
                given = dict(zip(asked, values, strict=True))
                cases.append(Case(name, _own_sizes(name, known[name], shape, given), chosen))
    backends = tuple(_one_of("backends", b, BACKENDS) for b in own["backends"].split(",")) if "backends" in own else ()
    seed = _whole("seed", own.get("seed", "0"), least=0)
    repeats = _whole("repeats", own.get("repeats", "10"))
    return Request(tuple(dict.fromkeys(cases)), backends, device, seed, repeats)


def _words(settings: Sequence[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    for word in settings:
        key, sign, value = word.partition("=")
        if not sign or not value:
            raise UsageError(f"settings are written key=value, got {word!r}; zoo bench --help shows how")
        if key in words:
            raise UsageError(f"{key}= is given twice; several values are written {key}=A,B")
        words[key] = value
    return words


def _operators(wanted: str, known: Mapping[str, Sizes]) -> list[str]:
    if wanted == "all":
        return list(known)
    for name in wanted.split(","):
        if name not in known:
            raise UsageError(f"no operator {name!r}{remedy(name, known, 'op can be all, ' + ', '.join(known))}")
    return wanted.split(",")


def _shapes(name: str | None, device: str) -> tuple[str, Sequence[Sizes]]:
    if name is None:
        dtype, shape = DEFAULT["cuda" if device.startswith("cuda") else "cpu"]
        return dtype, (shape,)
    return SETS[_one_of("shapes", name, tuple(SETS))]


def _own_sizes(operator: str, example: Sizes, shape: Sizes, given: Sizes) -> Sizes:
    """B, T and the operator's sizes: as given, else the operator's own, else the set's, else the example's."""
    sizes = {"B": shape["B"], "T": shape["T"]}
    for key, value in example.items():
        sizes[key] = OWN_SIZES.get(operator, {}).get(key, shape.get(key, value))
        if key == "D" and key not in OWN_SIZES.get(operator, {}):
            sizes[key] = shape["H"] * shape["K"]  # the width of a layer with these heads
    return _Frozen(sizes | {key: value for key, value in given.items() if key in sizes})


class _Frozen(dict[str, int]):
    """Sizes as part of a case, which is compared and hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def _whole(key: str, text: str, least: int = 1) -> int:
    value = int(text) if text.isdecimal() else -1
    if value < least:
        raise UsageError(f"{key} must be a whole number of at least {least}, got {text!r}")
    return value


def _one_of(key: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UsageError(f"no {key} {value!r}{remedy(value, known, key + ' can be ' + ', '.join(known))}")
    return value
