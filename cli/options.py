"""Options of the command line, made from data: dataclass fields, tables, quoted options that one command hands to
another. Imports no torch, so that `--help` answers at once.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        epochs: int = option(15, help="Passes over the images", type=positive_int)

    add_options(parser, Config)
    config = Config(**options_given(parser.parse_args(), Config))
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from cli.errors import UserError

DEFAULT_SEED = 123

# --- what a value may be ------------------------------------------------------------------------


MOST = 2**31 - 1  # of what is counted: far more than anyone wants and less than what libraries in C take


def number(
    kind: type = int,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> Callable:
    """An argparse type: a finite number of `kind` with above < x < below and least <= x <= most."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole number' if kind is int else 'number'}"
            ) from None
        if not ((kind is int or math.isfinite(value)) and above < value < below and least <= value <= most):
            bounds = [f"above {above:,.10g}"] * (above > -math.inf) + [f"at least {least:,.10g}"] * (least > -math.inf)
            bounds += [f"below {below:,.10g}"] * (below < math.inf)
            bounds += [f"at most {most:,.10g}"] * (most < max(value, MOST))
            shown = text if len(text) < 40 else f"{text[:30]}…"
            raise argparse.ArgumentTypeError(
                f"{shown} is out of range: expected {' and '.join(bounds) or 'a finite number'}"
            )
        return value

    return parse


positive_int = number(int, above=0, most=MOST)
positive_float = number(float, above=0)
seed_number = number(int, least=0)


# --- options as fields of a configuration -------------------------------------------------------

Needs = Mapping[str, Collection[str]]  # another option -> the values of it with which this one counts


def option(
    default: object = dataclasses.MISSING,
    *flags: str,
    help: str,
    default_of: str | None = None,
    needs: Needs | None = None,
    former: Mapping[str, str] | None = None,
    **argument: object,
):
    """A field of a configuration that is an option of the command line, too.

    Args:
        default: of the field.
        flags: what the option is called, where that does not follow from the field's name.
        help: a sentence without its full stop; the default is added.
        default_of: the default in words, where it is another than the field's.
        needs: other options, each of which must have one of the given values for this one to change anything.
        former: values that were called otherwise before -> what they are called now.
        argument: of argparse's `add_argument`.
    """
    metadata = {"flags": flags, "help": help, "default_of": default_of, "needs": needs or {}, "former": former or {}}
    return dataclasses.field(default=default, metadata=metadata | {"argument": argument})


def option_fields(config: type) -> dict[str, dataclasses.Field]:
    """The fields of a configuration that are options, by name."""
    return {field.name: field for field in dataclasses.fields(config) if "flags" in field.metadata}


def add_options(
    parser: argparse._ActionsContainer,
    config: type,
    only: Collection[str] | None = None,
    sometimes: Mapping[str, str] | None = None,
    **default_of: str,
) -> None:
    """Give `parser` the options of a configuration, or `only` some; None stands for what was not given.

    Args:
        sometimes: what is added to the words on the default, by option.
        default_of: the defaults in words of those options whose defaults are others here.
    """
    for name, field in option_fields(config).items():
        if only is not None and name not in only:
            continue
        about, argument = field.metadata, dict(field.metadata["argument"])
        if former := about["former"]:
            argument["type"] = lambda text, former=former: former.get(text, text)
        if "choices" in argument:
            argument["choices"] = list(argument["choices"])
        default = default_of.get(name) or about["default_of"] or in_words(field.default)
        default += (sometimes or {}).get(name, "")
        flags = about["flags"] or (flag(name),)
        parser.add_argument(*flags, dest=name, default=None, help=f"{about['help']} (default: {default})", **argument)


def in_words(value: object) -> str:
    """A value as one types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def options_given(args: argparse.Namespace, config: type) -> dict[str, object]:
    """The options of a configuration that were given, by field."""
    found = {name: getattr(args, name, None) for name in option_fields(config)}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in found.items() if value is not None
    }


def needs_of(config: type) -> dict[str, Needs]:
    """Option of a configuration -> what it needs."""
    return {name: field.metadata["needs"] for name, field in option_fields(config).items() if field.metadata["needs"]}


def idle_options(args: argparse.Namespace, *configs: type) -> list[str]:
    """A remark on each option that was changed although nothing that was asked for looks at it."""
    fields = {name: field for config in configs for name, field in option_fields(config).items()}

    def value(name: str) -> object:
        given = getattr(args, name, None)
        return fields[name].default if given is None and name in fields else given

    remarks = []
    for name, field in fields.items():
        if getattr(args, name, None) is None or value(name) in (field.default, list(as_tuple(field.default))):
            continue
        for other, values in field.metadata["needs"].items():
            if not set(values) & set(as_tuple(value(other))):
                remarks.append(f"{flag(name, fields)} goes with {flag(other, fields)} {' or '.join(values)} only")
    return remarks


def as_tuple(value: object) -> tuple:
    """Several values as a tuple, one as a tuple of itself."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def refuse_idle_options(args: argparse.Namespace, *configs: type) -> None:
    """Raise `UserError` with the first remark of `idle_options`, if there is one."""
    for remark in idle_options(args, *configs):
        raise UserError(f"{remark}; leave it out")


def flag(name: str, fields: Mapping[str, dataclasses.Field] | None = None) -> str:
    """ "batch_size" -> "--batch-size", or what the field of that name is called on the command line."""
    called = fields[name].metadata["flags"] if fields and name in fields else ()
    return called[0] if called else f"--{name.replace('_', '-')}"


# --- arguments of many commands -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a command computes and where its images are, as given: perhaps None and "auto"."""

    device: str | None
    precision: str
    data_dir: Path

    @classmethod
    def of(cls, args: argparse.Namespace) -> Machine:
        return cls(args.device, args.precision, args.data_dir)


def add_machine_arguments(parser: argparse.ArgumentParser, data_dir: Path = Path("datasets")) -> None:
    """On which device, in which precision, and where the images are."""
    add_device_arguments(parser)
    parser.add_argument("--data-dir", type=Path, default=data_dir, help="Folder of the images (default: %(default)s)")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """On which device and in which precision."""
    parser.add_argument("--device", help="Device: cpu, cuda, cuda:1, … (default: the first CUDA GPU, else the CPU)")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="Precision of the networks; auto takes bf16 where the hardware has it (default: %(default)s)",
    )


def add_seed_argument(parser: argparse.ArgumentParser, of: str = "") -> None:
    """One seed."""
    parser.add_argument(
        "--seed", type=seed_number, default=DEFAULT_SEED, help=f"Random seed{of} (default: %(default)s)"
    )


def add_seeds_argument(parser: argparse.ArgumentParser, of: str = "") -> None:
    """One seed or several."""
    parser.add_argument(
        "--seeds",
        "--seed",
        nargs="+",
        type=seed_number,
        default=[DEFAULT_SEED],
        help=f"Random seeds{of} (default: {DEFAULT_SEED})",
    )


def pick_all(flag: str, names: Sequence[str], known: Sequence[str], task_name: str) -> list[str]:
    """The names asked for, each once, or all that are known."""
    if not known:
        raise UserError(f"{task_name} has no OOD images; name a folder of them with --ood-dir DIR")
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"{flag} {name}: {task_name} has {', '.join(known)}")
    return list(known) if "all" in names else list(dict.fromkeys(names))


def changed_options(
    args: argparse.Namespace, parser: argparse.ArgumentParser, names: Sequence[str], config: type | None = None
) -> str:
    """The options that differ from their defaults, for names of files: "_lr-0.001_margins-0.3-0.7", or nothing; of a
    path its last folder and name. Options of a `config` that were given their default count as not given."""
    fields = option_fields(config) if config else {}

    def word(value: object) -> str:
        if not isinstance(value, Path):
            return str(value)
        return "-".join([part for part in value.parts if part not in ("..", value.anchor)][-2:])

    def is_default(name: str, value: object) -> bool:
        own = name in fields and not fields[name].metadata["default_of"]
        return value == parser.get_default(name) or (own and as_tuple(value) == as_tuple(fields[name].default))

    changed = {name: getattr(args, name) for name in names if not is_default(name, getattr(args, name))}
    return "".join(f"_{'-'.join([name, *map(word, as_tuple(value))])}" for name, value in changed.items())


# --- options that one command hands to another, in quotes: --eval-args='--epochs 1' -------------


def split_options(flag: str, text: str) -> list[str]:
    """The words of `text`, as a shell splits them. Raises `UserError`, which names `flag`."""
    try:
        return shlex.split(text)
    except ValueError as error:  # a quote that does not end, or nothing behind a backslash
        raise UserError(f"{flag}: {text!r} cannot be split into options: {str(error).lower()}") from None


def parse_options(
    flag: str, parser: argparse.ArgumentParser, words: Sequence[str], namespace: argparse.Namespace | None = None
) -> argparse.Namespace:
    """`parser.parse_args`, but what it does not take is a `UserError`, which names `flag`."""

    def refuse(message: str) -> None:
        raise UserError(f"{flag}: {message}")

    parser.error = refuse
    return parser.parse_args(words, namespace)


def check_options(flag: str, text: str, parser: argparse.ArgumentParser, refused: Mapping[str, str]) -> list[str]:
    """The words of `text`, once it is certain that the parser takes them.

    Args:
        refused: name in the namespace of each option that must not be among them -> what to do instead.

    Raises:
        UserError: the parser does not take them, or one is refused; it names `flag`.
    """
    words = split_options(flag, text)
    parsed = parse_options(flag, parser, words, argparse.Namespace(**dict.fromkeys(refused)))  # None: it was not given
    for name, instead in refused.items():
        if getattr(parsed, name) is not None:
            raise UserError(f"{flag}: no --{name.replace('_', '-')} here: {instead}")
    return words
