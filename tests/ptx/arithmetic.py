"""Instructions that compute: integers, floats, comparisons, conversions."""

from ptx.parser import SIZES, Instruction, Unsupported
from ptx.translator import Translator, bits_of, instruction, is_float, numpy_kind

SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
NARROW = ("bf16", "f16", "bf16x2", "f16x2")


def _computed(sign: str, operands: list[str]) -> str:
    """An expression for a + b, a - b, a * b or a * b + c. In float64, the result for 16-bit
    operands is exact enough to be rounded afterwards."""
    if sign == "fma":
        return f"{operands[0]} * {operands[1]} + {operands[2]}"
    return f"{operands[0]} {SIGNS[sign]} {operands[1]}"


def _narrow(t: Translator, i: Instruction) -> None:
    """Arithmetic on one 16-bit float, or on a pair in 32 bits."""
    kind, pair = i.type.removesuffix("x2"), i.type.endswith("x2")
    halves = []
    for shift in (0, 16) if pair else (0,):
        words = [t.read(a, "b32" if pair else "b16") for a in i.args[1:]]
        parts = [f"(({w}) >> u4({shift})).astype(u2)" if pair else w for w in words]
        result = _computed(i.name, [f"widened({p}, {kind!r})" for p in parts])
        halves.append(f"narrowed(np.asarray({result}), {kind!r})")
    if pair:
        t.put(i.args[0], f"{halves[0]}.astype(u4) | ({halves[1]}.astype(u4) << u4(16))")
    else:
        t.put(i.args[0], halves[0])


def _flushed(i: Instruction, expression: str) -> str:
    return f"flushed({expression})" if "ftz" in i.parts and i.type == "f32" else expression


@instruction("add", "sub", "mul", "and", "or", "xor")
def _binary(t: Translator, i: Instruction) -> None:
    if i.name in ("add", "sub", "mul") and i.type in NARROW:
        return _narrow(t, i)
    if i.type in ("u16x2", "s16x2"):
        return _pair_of_integers(t, i)
    if i.name == "mul" and not is_float(i.type) and "lo" not in i.parts:
        return t.put(i.args[0], _product(t, i))
    kind = i.type if i.type == "pred" or is_float(i.type) else bits_of(i.type)
    a, b = t.read(i.args[1], kind), t.read(i.args[2], kind)
    t.put(i.args[0], _flushed(i, f"{a} {SIGNS[i.name]} {b}"))


def _pair_of_integers(t: Translator, i: Instruction) -> None:
    """Add the lower halves and the upper halves, without a carry between them."""
    if i.name != "add":
        raise Unsupported(i.op)
    a, b = (t.read(x, "b32") for x in i.args[1:])
    upper = f"(({a}) & u4(0xffff0000)) + (({b}) & u4(0xffff0000))"
    t.put(i.args[0], f"((({a}) + ({b})) & u4(0xffff)) | ({upper})")


def _product(t: Translator, i: Instruction) -> str:
    """An integer product: .lo, .hi or .wide."""
    kind, size = i.type, SIZES[i.type]
    if "wide" not in i.parts and "hi" not in i.parts:
        return f"{t.read(i.args[1], bits_of(kind))} * {t.read(i.args[2], bits_of(kind))}"
    a, b = t.read(i.args[1], kind), t.read(i.args[2], kind)
    if "hi" in i.parts and size == 8:
        raise Unsupported(i.op)
    wide = ("i" if kind[0] == "s" else "u") + str(size * 2)
    product = f"({a}).astype({wide}) * ({b}).astype({wide})"
    if "wide" in i.parts:
        return product
    return f"(({product}) >> {wide}({size * 8})).astype({numpy_kind(kind)})"


@instruction("fma", "mad")
def _fma(t: Translator, i: Instruction) -> None:
    if i.type in NARROW:
        return _narrow(t, i)
    if is_float(i.type):
        operands = ", ".join(t.read(a, i.type) for a in i.args[1:])
        return t.put(i.args[0], _flushed(i, f"fma{SIZES[i.type] * 8}({operands})"))
    last = t.read(i.args[3], f"u{SIZES[i.type] * (16 if 'wide' in i.parts else 8)}")
    t.put(i.args[0], f"M.bits({_product(t, i)}) + {last}")


@instruction("div")
def _div(t: Translator, i: Instruction) -> None:
    a, b = t.read(i.args[1], i.type), t.read(i.args[2], i.type)
    t.put(i.args[0], f"{a} / {b}" if is_float(i.type) else f"divided({a}, np.asarray({b}))")


@instruction("rem")
def _rem(t: Translator, i: Instruction) -> None:
    a, b = t.read(i.args[1], i.type), t.read(i.args[2], i.type)
    t.put(i.args[0], f"remainder({a}, np.asarray({b}))")


@instruction("neg", "abs")
def _sign(t: Translator, i: Instruction) -> None:
    if i.type in NARROW:
        kind, signs = ("b32", "u4(0x80008000)") if i.type.endswith("x2") else ("b16", "u2(0x8000)")
        change = f"^ {signs}" if i.name == "neg" else f"& ~{signs}"
        t.put(i.args[0], f"{t.read(i.args[1], kind)} {change}")
    elif i.name == "abs":
        t.put(i.args[0], f"np.abs({t.read(i.args[1], i.type)})")
    elif is_float(i.type):
        t.put(i.args[0], f"-{t.read(i.args[1], i.type)}")
    else:
        t.put(i.args[0], f"u{SIZES[i.type]}(0) - {t.read(i.args[1], bits_of(i.type))}")


@instruction("not")
def _not(t: Translator, i: Instruction) -> None:
    kind = i.type if i.type == "pred" else bits_of(i.type)
    t.put(i.args[0], f"~{t.read(i.args[1], kind)}")


@instruction("min", "max")
def _extreme(t: Translator, i: Instruction) -> None:
    ignores_nan = is_float(i.type) and "NaN" not in i.parts
    name = f"np.f{i.name}" if ignores_nan else f"np.{i.name}imum"
    t.put(i.args[0], f"{name}({t.read(i.args[1], i.type)}, {t.read(i.args[2], i.type)})")


@instruction("shl")
def _shl(t: Translator, i: Instruction) -> None:
    a, by = t.read(i.args[1], bits_of(i.type)), t.read(i.args[2], "u32")
    t.put(i.args[0], f"shifted_left({a}, {by}, {SIZES[i.type] * 8})")


@instruction("shr")
def _shr(t: Translator, i: Instruction) -> None:
    a, by = t.read(i.args[1], i.type), t.read(i.args[2], "u32")
    t.put(i.args[0], f"shifted_right({a}, {by}, {SIZES[i.type] * 8})")


@instruction("bfe", "bfi", "prmt")
def _bytes(t: Translator, i: Instruction) -> None:
    if SIZES[i.type] != 4:
        raise Unsupported(i.op)
    operands = [t.read(a, "u32") for a in i.args[1:]]
    if i.name == "bfe":
        operands.append(str(i.type[0] == "s"))
    name = {"bfe": "field", "bfi": "inserted", "prmt": "permuted"}[i.name]
    t.put(i.args[0], f"{name}({', '.join(operands)})")


@instruction("setp")
def _setp(t: Translator, i: Instruction) -> None:
    comparison = i.parts[1]
    if i.type in ("bf16x2", "f16x2"):
        return _setp_of_a_pair(t, i)
    if "|" in str(i.args[0]) or {"and", "or", "xor"} & set(i.parts):
        raise Unsupported(i.op)
    if i.type in ("bf16", "f16"):
        a, b = (f"widened({t.read(x, 'b16')}, {i.type!r})" for x in i.args[1:3])
    else:
        kind = i.type if i.type[0] in "fsu" else bits_of(i.type)
        a, b = t.read(i.args[1], kind), t.read(i.args[2], kind)
    unordered = f"np.isnan({a}) | np.isnan({b})"
    if comparison == "num":
        result = f"~({unordered})"
    elif comparison not in COMPARISONS:  # true if either operand is NaN
        result = f"({a} {COMPARISONS[comparison[:-1]]} {b}) | {unordered}"
    else:
        result = f"{a} {COMPARISONS[comparison]} {b}"
        if comparison == "ne" and i.type in ("f16", "bf16", "f32", "f64"):
            result = f"({result}) & ~({unordered})"
    t.put(i.args[0], result)


def _setp_of_a_pair(t: Translator, i: Instruction) -> None:
    """p|q: the comparison of the lower halves, and that of the upper halves."""
    comparison, kind = i.parts[1], i.type.removesuffix("x2")
    both = str(i.args[0]).split("|")
    if comparison not in COMPARISONS or comparison == "ne" or len(i.parts) > 3 or len(both) != 2:
        raise Unsupported(i.op)
    words = [t.read(x, "b32") for x in i.args[1:3]]
    for place, shift in zip(both, (0, 16), strict=True):
        a, b = (f"widened((({w}) >> u4({shift})).astype(u2), {kind!r})" for w in words)
        t.put(place, f"{a} {COMPARISONS[comparison]} {b}")


@instruction("selp")
def _selp(t: Translator, i: Instruction) -> None:
    a, b = (t.read(x, bits_of(i.type)) for x in i.args[1:3])
    t.put(i.args[0], f"np.where({t.read(i.args[3], 'pred')}, {a}, {b})")


@instruction("mov")
def _mov(t: Translator, i: Instruction) -> None:
    to, source = i.args
    if isinstance(to, list):  # unpack
        part = SIZES[i.type] // len(to)
        for j, one in enumerate(to):
            shift = f"u{SIZES[i.type]}({8 * part * j})"
            t.put(one, f"({t.read(source, i.type)} >> {shift}).astype(u{part})")
    elif isinstance(source, list):  # pack
        part, wide = SIZES[i.type] // len(source), f"u{SIZES[i.type]}"
        words = [t.read(s, f"b{8 * part}") for s in source]
        terms = [f"(({w}).astype({wide}) << {wide}({8 * part * j}))" for j, w in enumerate(words)]
        t.put(to, " | ".join(terms))
    else:
        kind = i.type if i.type == "pred" else bits_of(i.type)
        t.put(to, f"M.spread({t.read(source, kind)})")


@instruction("cvt")
def _cvt(t: Translator, i: Instruction) -> None:
    to, source = i.parts[-2:]
    rounding = [p for p in i.parts[1:-2] if p.startswith("r")]
    if rounding not in ([], ["rna" if to == "tf32" else "rn"]):
        raise Unsupported(i.op)
    if to == "tf32":
        return t.put(i.args[0], f"tf32_bits({t.read(i.args[1], 'u32')})")
    if to in ("bf16x2", "f16x2"):
        form = "bf16_bits({})" if to == "bf16x2" else "({}).astype(f2).view(u2)"
        high, low = (form.format(f"M.spread({t.read(x, 'f32')})") for x in i.args[1:3])
        return t.put(i.args[0], f"(({high}).astype(u4) << u4(16)) | ({low}).astype(u4)")
    if (to == "bf16" and source not in ("f32", "f64")) or (is_float(source) and to[0] in "su"):
        raise Unsupported(i.op)
    a = t.read(i.args[1], "b16" if source == "bf16" else source)
    if source == "bf16":
        wide = f"from_bf16({a})"
        return t.put(i.args[0], wide if to == "f32" else f"({wide}).astype({numpy_kind(to)})")
    if to == "bf16":
        return t.put(i.args[0], f"bf16_bits({a if source == 'f32' else f'to_odd({a})'})")
    t.put(i.args[0], f"({a}).astype({numpy_kind(to)})")


def _function(name: str, expression: str) -> None:
    @instruction(name)
    def emit(t: Translator, i: Instruction) -> None:
        t.put(i.args[0], _flushed(i, expression.format(t.read(i.args[1], i.type))))


# Exact here; a GPU is off by a few units in the last place.
_function("ex2", "np.exp2({})")
_function("rcp", "1 / {}")
_function("sqrt", "np.sqrt({})")
