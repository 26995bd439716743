"""Instructions that compute: integers, floats, comparisons, conversions."""

from ptx.parser import SIZES, Instruction, Unsupported
from ptx.translator import Translator, bits_of, instruction, is_float, natural, numpy_kind

COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
NARROW = ("bf16", "f16", "bf16x2", "f16x2")

# How an operand is read: as the instruction's type, its natural type or its bits, or as a type.
READ = {"type": lambda kind: kind, "natural": natural, "bits": bits_of}
# The operands of an instruction and its result. ex2, rcp and sqrt are exact here; a GPU is off by a
# few units in the last place.
TABLE = {
    "add": ("natural natural", "{0} + {1}"),
    "sub": ("natural natural", "{0} - {1}"),
    "mul": ("natural natural", "{0} * {1}"),
    "and": ("natural natural", "{0} & {1}"),
    "or": ("natural natural", "{0} | {1}"),
    "xor": ("natural natural", "{0} ^ {1}"),
    "not": ("natural", "~{0}"),
    "neg": ("natural", "-{0}"),
    "abs": ("type", "np.abs({0})"),
    "div": ("type type", "divided({0}, {1})"),
    "rem": ("type type", "remainder({0}, {1})"),
    "fma": ("type type type", "fma({0}, {1}, {2})"),
    "min": ("type type", "np.fmin({0}, {1})"),
    "max": ("type type", "np.fmax({0}, {1})"),
    "min.NaN": ("type type", "np.minimum({0}, {1})"),
    "max.NaN": ("type type", "np.maximum({0}, {1})"),
    "shl": ("bits u32", "shifted_left({0}, {1})"),
    "shr": ("type u32", "shifted_right({0}, {1})"),
    "selp": ("bits bits pred", "np.where({2}, {0}, {1})"),
    "bfe": ("type u32 u32", "field({0}, {1}, {2})"),
    "bfi": ("u32 u32 u32 u32", "inserted({0}, {1}, {2}, {3})"),
    "prmt": ("u32 u32 u32", "permuted({0}, {1}, {2})"),
    "ex2": ("type", "np.exp2({0})"),
    "rcp": ("type", "1 / {0}"),
    "sqrt": ("type", "np.sqrt({0})"),
}


@instruction(*TABLE, "mad")
def _tabled(t: Translator, i: Instruction) -> None:
    name = i.name + ".NaN" * ("NaN" in i.parts)
    if i.type in NARROW and i.name in ("add", "sub", "mul", "fma"):
        return _narrow(t, i)
    if i.type in NARROW and i.name in ("neg", "abs"):
        signs = "u4(0x80008000)" if i.type.endswith("x2") else "u2(0x8000)"
        change = f"{{0}} ^ {signs}" if i.name == "neg" else f"{{0}} & ~{signs}"
        return t.compute(i, [bits_of(i.type)], change)
    if i.name == "add" and i.type in ("u16x2", "s16x2"):  # no carry between the halves
        upper = "({0} & u4(0xffff0000)) + ({1} & u4(0xffff0000))"
        return t.compute(i, ["u32", "u32"], f"(({{0}} + {{1}}) & u4(0xffff)) | ({upper})")
    if i.name in ("mul", "mad") and not is_float(i.type):
        return _product(t, i)
    if i.type.endswith("x2") or (i.name in ("bfe", "bfi", "prmt") and SIZES[i.type] != 4):
        raise Unsupported(i.op)
    kinds, template = TABLE["fma" if i.name == "mad" else name]
    if "ftz" in i.parts and i.type == "f32":
        template = f"flushed({template})"
    t.compute(i, [READ.get(k, lambda _, k=k: k)(i.type) for k in kinds.split()], template)


def _half(word: str, shift: int, kind: str) -> str:
    """The lower (`shift` 0) or upper (16) 16-bit float of a word, as float64."""
    return f"widened((({word}) >> u4({shift})).astype(u2), {kind!r})"


def _narrow(t: Translator, i: Instruction) -> None:
    """Arithmetic on one 16-bit float, or on a pair in 32 bits. In float64, the result is exact
    enough to be rounded afterwards."""
    kind, kinds = i.type.removesuffix("x2"), [bits_of(i.type)] * (len(i.args) - 1)
    template = "{0} * {1} + {2}" if i.name == "fma" else TABLE[i.name][1]
    places = [f"{{{n}}}" for n in range(len(kinds))]

    def rounded(operands: list[str]) -> str:
        return f"narrowed(np.asarray({template.format(*operands)}), {kind!r})"

    if i.type == kind:
        return t.compute(i, kinds, rounded([f"widened({p}, {kind!r})" for p in places]))
    low, high = (rounded([_half(p, shift, kind) for p in places]) for shift in (0, 16))
    t.compute(i, kinds, f"{low}.astype(u4) | ({high}.astype(u4) << u4(16))")


def _product(t: Translator, i: Instruction) -> None:
    """An integer product: .lo, .hi or .wide; mad adds its last operand."""
    size, kind, result = SIZES[i.type], i.type, bits_of(i.type)
    wide = ("i" if kind[0] == "s" else "u") + str(size * 2)
    product = f"({{0}}).astype({wide}) * ({{1}}).astype({wide})"
    if "wide" in i.parts:
        result = f"u{size * 16}"
    elif "hi" not in i.parts:
        kind, product = result, "{0} * {1}"
    elif size == 8:
        raise Unsupported(i.op)
    else:
        product = f"(({product}) >> {wide}({size * 8})).astype({numpy_kind(kind)})"
    if i.name == "mul":
        return t.compute(i, [kind, kind], product)
    t.compute(i, [kind, kind, result], f"M.bits({product}) + {{2}}")


@instruction("setp")
def _setp(t: Translator, i: Instruction) -> None:
    """One comparison, or p|q: that of the lower halves and that of the upper halves."""
    comparison, pair, narrow = i.parts[1], i.type.endswith("x2"), i.type in NARROW
    places = str(i.args[0]).split("|")
    refused = {"and", "or", "xor", *(["ftz"] if pair else [])}
    if len(places) != 1 + pair or refused & set(i.parts):
        raise Unsupported(i.op)
    for place, shift in zip(places, (0, 16), strict=False):
        a, b = (t.read(x, bits_of(i.type) if narrow else i.type) for x in i.args[1:])
        if pair:
            a, b = (_half(x, shift, i.type.removesuffix("x2")) for x in (a, b))
        elif narrow:
            a, b = (f"widened({x}, {i.type!r})" for x in (a, b))
        unordered = f"np.isnan({a}) | np.isnan({b})"
        if comparison == "num":
            result = f"~({unordered})"
        elif comparison not in COMPARISONS:  # true if either operand is NaN
            result = f"({a} {COMPARISONS[comparison[:-1]]} {b}) | {unordered}"
        else:
            result = f"{a} {COMPARISONS[comparison]} {b}"
            if comparison == "ne" and (is_float(i.type) or narrow):
                result = f"({result}) & ~({unordered})"
        t.put(place, result)


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
        t.put(to, t.spread(source, "pred" if i.type == "pred" else bits_of(i.type)))


@instruction("cvt")
def _cvt(t: Translator, i: Instruction) -> None:
    to, source = i.parts[-2:]
    rounding = [p for p in i.parts[1:-2] if p.startswith("r")]
    if rounding not in ([], ["rna" if to == "tf32" else "rn"]):
        raise Unsupported(i.op)
    if to == "tf32":
        return t.compute(i, ["u32"], "tf32_bits({0})")
    if to in ("bf16x2", "f16x2"):
        form = "bf16_bits({})" if to == "bf16x2" else "({}).astype(f2).view(u2)"
        high, low = (form.format(t.spread(x, "f32")) for x in i.args[1:3])
        return t.put(i.args[0], f"(({high}).astype(u4) << u4(16)) | ({low}).astype(u4)")
    if (to == "bf16" and source not in ("f32", "f64")) or (is_float(source) and to[0] in "su"):
        raise Unsupported(i.op)
    value = "from_bf16({0})" if source == "bf16" else "{0}"
    if to == "bf16":
        value = f"bf16_bits({value if source == 'f32' else f'to_odd({value})'})"
    elif (source, to) != ("bf16", "f32"):
        value = f"({value}).astype({numpy_kind(to)})"
    t.compute(i, ["b16" if source == "bf16" else source], value)
