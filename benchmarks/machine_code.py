"""What ptxas may have done to the Hopper kernels that no warning tells of.

    python -m benchmarks.mosaic_gpu_static --head_dim=64 --sass --cuda_root=DIR > FILE
    python -m benchmarks.machine_code FILE ...

ptxas sometimes takes a register that the next step's product reads for something else, and
gradients are wrong from the second step on. Here each register operand of each product (HGMMA) is
followed back to what may have written it last. What was loaded before a loop must not have been
written, on some way through the loop, by anything that computes.

And shared memory may be given back, to the copies that fill it, while loads from it are in
flight: see `released_while_loading`. Exits with status 1 if either is found.
"""

import re
import sys

_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# What brings an operand from somewhere else.
_MOVES = ("LDSM", "LDS", "LDL", "MOV", "IMAD.MOV", "IMAD.U32", "CS2R")
# What writes no general register, though its first operand is one.
_WRITES_NONE = (
    "ST", "BAR", "SYNCS", "RED.", "BRA", "UTMA", "NANO", "WARP", "DEPBAR", "ISETP", "FSETP",
    "HSETP", "PLOP", "R2UR", "R2P", "U", "EXIT", "NOP",
)  # fmt: skip


def kernels(text: str) -> dict[str, list[str]]:
    """Returns each kernel's labels, which begin with a dot, and instructions.

    Args:
      text: as nvdisasm prints it; other lines are left out.
    """
    found: dict[str, list[str]] = {}
    code: list[str] | None = None
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", line.strip()):
            name = section.group(1)
            code = found.setdefault(f"{name} {sum(x.startswith(name) for x in found) + 1}", [])
        elif code is not None and (label := _LABEL.match(line.strip())):
            code.append(label.group(1))
        elif code is not None and (instruction := _INSTRUCTION.search(line)):
            code.append(instruction.group(1))
    return found


def overwritten_operands(code: list[str]) -> list[str]:
    """Returns a sentence for each operand that a loop may overwrite."""
    before = _predecessors(code)
    plain = [_PREDICATE.sub("", x) for x in code]
    writes = [_written(x) for x in plain]
    found = []
    for number, product in enumerate(plain):
        operand = product.startswith("HGMMA") and product.split(",")[1].strip()
        if not operand or not re.fullmatch(r"R\d+", operand):
            continue
        first = int(operand[1:])
        for register in range(first, first + 4):
            writers = set()
            seen: set[int] = set()
            ahead = list(before[number])
            while ahead:
                at = ahead.pop()
                if at in seen:
                    continue
                seen.add(at)
                if register in writes[at]:
                    writers.add(plain[at].split()[0])
                    if plain[at] == code[at]:
                        continue  # Always written here: what was before does not matter.
                ahead += before[at]
            computed = {x for x in writers if not x.startswith(_MOVES)}
            if computed and computed != writers:
                found.append(f"{product}: R{register} was written by {', '.join(sorted(writers))}")
    return found


def released_while_loading(code: list[str]) -> list[str]:
    """Returns a sentence for each load from SMEM that may be in flight at an arrival.

    Threads arrive at a named barrier (BAR.ARV) to give a slot back to TMA, whose copies are not
    ordered behind their loads. A load is done when something has used what it gives, when a
    product issued after it has been waited for, or behind a fence.
    """
    after: list[list[int]] = [[] for _ in code]
    for number, before in enumerate(_predecessors(code)):
        for at in before:
            after[at].append(number)
    # Of each instruction, what may be in flight before it: loads, and products issued since.
    flying: list[set[tuple[int, int]]] = [set() for _ in code]
    ahead = list(range(len(code)))
    while ahead:
        at = ahead.pop()
        always = _PREDICATE.sub("", code[at]) == code[at]
        left = _in_flight_after(code, at, flying[at]) if always else set(flying[at])
        for number in after[at]:
            if not left <= flying[number]:
                flying[number] |= left
                ahead.append(number)
    arrivals = [n for n, x in enumerate(code) if _PREDICATE.sub("", x).startswith("BAR.ARV")]
    loads = {load: n for n in reversed(arrivals) for load, _ in flying[n]}
    return [f"{code[n]}: {code[load]} may be in flight" for load, n in sorted(loads.items())]


def _in_flight_after(
    code: list[str], at: int, flying: set[tuple[int, int]]
) -> set[tuple[int, int]]:
    instruction = code[at]
    if instruction.startswith(("FENCE.VIEW.ASYNC", "EXIT")):
        return set()
    if wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", instruction):
        return {x for x in flying if x[1] <= int(wait.group(1))}
    if instruction.startswith("HGMMA"):
        # Two are the most that code leaves in flight.
        issued = int("gsb0" in instruction)
        return {(load, min(products + issued, 3)) for load, products in flying}
    named = {int(x) for x in re.findall(r"\bR(\d+)", instruction)}
    left = {x for x in flying if not named & set(_written(code[x[0]]))}
    return left | {(at, 0)} if instruction.startswith(("LDS", "LDSM")) else left


def _predecessors(code: list[str]) -> list[list[int]]:
    labels = {x: n for n, x in enumerate(code) if x.startswith(".")}
    before: list[list[int]] = [[] for _ in code]
    for number, x in enumerate(code):
        plain = _PREDICATE.sub("", x)
        target = re.search(r"\((\.L_x_\d+)\)", plain) if plain.startswith("BRA") else None
        if target and target.group(1) in labels:
            before[labels[target.group(1)]].append(number)
        ends = plain == x and plain.startswith(("BRA", "EXIT"))
        if number + 1 < len(code) and not ends:
            before[number + 1].append(number)
    return before


def _written(instruction: str) -> range:
    """Returns the registers that an instruction without its predicate writes."""
    name = instruction.split()[0]
    if name.startswith("."):
        return range(0)
    if product := re.match(r"HGMMA\.64x(\d+)x\S+\s+R(\d+)", instruction):
        columns, first = (int(x) for x in product.groups())
        return range(first, first + columns // 2)
    target = re.match(r"\S+\s+(?:(?:P|UP)\w+,\s*)*R(\d+)", instruction)
    if name.startswith(_WRITES_NONE) or target is None:
        return range(0)
    if ".128" in name or (name.startswith("LDSM") and ".4" in name):
        count = 4
    elif ".64" in name or "WIDE" in name or name.startswith("CS2R") or name.endswith(".2"):
        count = 2
    else:
        count = 1
    return range(int(target.group(1)), int(target.group(1)) + count)


def main(paths: list[str]) -> int:
    """Checks files; returns the exit status."""
    status = 0
    for path in paths:
        with open(path) as file:
            found = kernels(file.read())
        if not found:
            print(f"{path}: no machine code; it needs --sass and --cuda_root")
            status = 1
        for name, code in found.items():
            overwritten = overwritten_operands(code)
            released = released_while_loading(code)
            print(
                f"{path}: {name}: {len(code)} lines, {len(overwritten)} operands overwritten,"
                f" {len(released)} loads in flight"
            )
            for sentence in overwritten[:4] + released[:4]:
                print(f"  {sentence}")
            status = status or int(bool(overwritten or released))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
