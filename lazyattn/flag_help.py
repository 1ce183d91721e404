"""`--help`: what a program does, and its flags by mode.

A flag's help says which modes it is for, "eval, inspect: ..."; without that it is for all.
"""

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence

from absl import flags

_ASKED = re.compile(r"--?(h|\?|help|helpshort|helpfull)")
_MODES = re.compile(r"(\w+(?:, \w+)*): ")
_REPEATED = ";\n    repeat"  # absl adds this, and these flags say it themselves
_WIDTH = 98
_INDENT = 26


def is_asked(argv: Sequence[str]) -> bool:
    """Returns whether a command line asks for help; argv[0] is the program."""
    arguments = list(argv[1:])
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    return any(_ASKED.fullmatch(argument) for argument in arguments)


def help_text(
    title: str,
    modes: Mapping[str, str],
    values: flags.FlagValues = flags.FLAGS,
    more: Mapping[str, str] | None = None,
) -> str:
    """Returns what `--help` prints.

    Args:
      title: what the program is, as its docstring says.
      modes: what each does, by name; none: the program has no modes.
      values: the flags, of which this project's are listed.
      more: help on what is no flag of its own, by name.

    Returns:
      Lines of up to 98 characters.
    """
    parts = [title.strip()]
    if modes:
        parts.append("\n".join(["Modes", *(_entry(f"--mode={m}", modes[m]) for m in modes)]))
    of_all = [(name, text) for name, text in (more or {}).items()]
    by_mode: dict[str, list[tuple[str, str]]] = {mode: [] for mode in modes}
    for flag in own_flags(values):
        if flag.name == "mode":
            continue
        about = flag.help.split(_REPEATED)[0]
        name, text = _name(flag), about.rstrip(".;") + _default(flag) + "."
        match = _MODES.match(about)
        names = match[1].split(", ") if match else []
        if match is None or not set(names) <= set(modes):
            of_all.append((name, text))
            continue
        for mode in names:
            by_mode[mode].append((name, text[match.end() :]))
    of_all.append(("--verbosity=-1", "Messages of the libraries: 0 shows information, too."))
    heading = "Flags of all modes" if modes else "Flags"
    parts.append("\n".join([heading, *(_entry(*each) for each in sorted(of_all))]))
    for mode, entries in by_mode.items():
        if entries:
            lines = [f"Flags of --mode={mode}", *(_entry(*each) for each in sorted(entries))]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def own_flags(values: flags.FlagValues = flags.FLAGS) -> list[flags.Flag]:
    """Returns the flags that this project defines, not those of libraries."""
    found: dict[str, flags.Flag] = {}
    for module, defined in values.flags_by_module_dict().items():
        # A program that is run goes by its path.
        if module.startswith("lazyattn.") or module == sys.argv[0]:
            found |= {flag.name: flag for flag in defined}
    return [found[name] for name in sorted(found) if "." not in name]


def _name(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--[no]{flag.name}"
    return f"--{flag.name}"


def _default(flag: flags.Flag) -> str:
    value = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    return "" if value is None or value is False or value == "" else f" ({value})"


def _entry(name: str, text: str) -> str:
    if text.split()[0].isalpha():  # else a value, as float32
        text = text[:1].upper() + text[1:]
    indent = " " * _INDENT
    lines = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    head = f"  {name}"
    if len(head) < _INDENT:
        return "\n".join([head.ljust(_INDENT) + lines[0].strip(), *lines[1:]])
    return "\n".join([head, *lines])
