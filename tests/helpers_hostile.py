"""Model files in parts, and what accidents and attackers do to them.

Strategies give parts, of which `raw` makes bytes: hypothesis keeps all that it has drawn, and parts share the
bytes of the whole file.
"""

import io
import json
import math
import struct
import zipfile
from dataclasses import dataclass, field

from hypothesis import strategies as st

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "I64": 8}
SIZES |= {"I16": 2, "U16": 2, "U32": 4, "F4": 0.5, "BOOL": 1, "C64": 8, "F8_E8M0": 1}
NAN = {"F32": b"\x00\x00\xc0\x7f", "F16": b"\x00\x7e", "BF16": b"\xc0\x7f"}


@dataclass
class Safetensors:
    """A file in parts: dtype, shape and bytes of each tensor."""

    tensors: list[tuple[str, str, list[int], bytes]]
    metadata: dict[str, str] = field(default_factory=dict)

    def __repr__(self):
        return f"Safetensors({_listed(self.tensors)}, {self.metadata!r:.300})"

    @classmethod
    def of(cls, path):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        metadata = header.pop("__metadata__", {})
        parts = [(k, e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for k, e in header.items()]
        return cls(parts, metadata)

    def raw(self):
        entries, end = [json.dumps("__metadata__") + ":" + json.dumps(self.metadata)], 0
        for key, dtype, shape, data in self.tensors:
            begin, end = end, end + len(data)
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            entries.append(json.dumps(key) + ":" + json.dumps(entry))
        header = ("{" + ",".join(entries) + "}").encode()
        return len(header).to_bytes(8, "little") + header + b"".join(part[3] for part in self.tensors)


def _listed(tensors):
    return [(*parts, len(data)) for *parts, data in tensors]


SHAPES = [
    [],
    [0],
    [1],
    [2**40, 0],
    [0, 2**40],
    [2**62, 4],
    [1] * 70,
    [3, 5],
    [7],
    [1, 1, 1, 1, 1],
    [-4],
    [1.5],
]
NUMBERS = ["999999999", "-1", "00", "x", "7", "255", ""]
TEXTS = [
    "", "{", "[]", "7", "null", '{"transformer": []}', '{"transformer": {"num_heads": -2}}', "[" * 5000,
    '{"transformer": {"num_heads": 1e400, "dim": "x"}}', '{"transformer": {"image_model": 5, "dim": []}}',
    '{"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}}', '{"layers": {"a": {"format": "nvfp4"}}}',
    '{"layers": [1]}', '{"lora_alpha": NaN}', '{"lora_alpha": {"a": 1}}', '{"alpha_pattern": {"": null}}',
    "\ud800", "\0",
]  # fmt: skip
NAMES = ["config", "_quantization_metadata", "lora_adapter_metadata", "format", "empty_start"]
EXTRA = [
    "scaled_fp8", "blocks.0.ffn.0.comfy_quant", "blocks.0.ffn.0.weight_scale", "spiece_model", "x" * 600,
    "encoder.block.0.layer.0.SelfAttention.q.comfy_quant", "blocks.0.ffn.0.alpha", "fps_embedding.weight",
    "blocks.0.self_attn.q.oft_blocks", "model.diffusion_model.x", "vae.x", "\ud800", "decoder.head.0.gamma",
]  # fmt: skip


@st.composite
def changed_safetensors(draw, base):
    """A valid container, of which tensors and metadata are no longer those of the model."""
    tensors, metadata = list(base.tensors), dict(base.metadata)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(tensors) - 1))
        key, dtype, shape, data = tensors[at]
        match draw(
            st.sampled_from(["shape", "dtype", "name", "drop", "twice", "nan", "extra", "metadata", "no"])
        ):
            case "shape":
                shape = draw(st.sampled_from([*SHAPES, shape[::-1], [*shape, 1], shape[1:], [0, *shape[1:]]]))
                tensors[at] = key, dtype, shape, sized(data, shape, dtype)
            case "dtype":
                dtype = draw(st.sampled_from(sorted(SIZES)))
                tensors[at] = key, dtype, shape, sized(data, shape, dtype)
            case "name":
                number = draw(st.sampled_from(NUMBERS))
                parts = key.split(".")
                numbers = [i for i, part in enumerate(parts) if part.isdigit()] or [0]
                parts[numbers[0]] = number
                tensors[at] = ".".join(parts), dtype, shape, data
            case "drop":
                del tensors[at]
            case "twice":
                tensors.append(tensors[at])
            case "nan" if dtype in NAN:
                tensors[at] = key, dtype, shape, NAN[dtype] * (len(data) // SIZES[dtype])
            case "extra":
                name = draw(st.sampled_from(EXTRA))
                kinds = [
                    ("U8", [3], b"{}}"),
                    ("F32", [], bytes(4)),
                    ("F8_E4M3", [2], b"{}"),
                    ("F4", [4], b"{}"),
                ]
                tensors.append((name, *draw(st.sampled_from(kinds))))
            case "metadata":
                metadata[draw(st.sampled_from(NAMES))] = draw(st.sampled_from(TEXTS))
    return Safetensors(tensors, metadata)


def sized(data, shape, dtype):
    """As many bytes as a shape asks for, where that is a shape and at most 1 MB."""
    whole = all(isinstance(n, int) and 0 <= n < 2**20 for n in shape)
    count = min(int(math.prod(shape) * SIZES[dtype]) if whole else len(data), 2**20)
    return (data + bytes(count))[:count]


@dataclass
class Damage:
    """The bytes of a file with some changed: (place, bytes taken out, bytes put in)."""

    whole: bytes = field(repr=False)
    changes: list[tuple[int, int, bytes]]

    def raw(self):
        data = bytearray(self.whole)
        for at, out, put in self.changes:
            data[at : at + out] = put
        return bytes(data)


@st.composite
def damaged(draw, raw):
    """A file damaged as by a disk or a broken download, mostly in the head."""
    changes, length = [], len(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(length, 4000) - 1) | st.integers(0, length - 1))
        match draw(st.sampled_from(["byte", "number", "cut", "zeros", "insert"])):
            case "byte":
                change = at, 1, bytes([draw(st.integers(0, 255))])
            case "number":
                value = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
                change = at, 8, struct.pack("<Q", value)
            case "cut":
                change = max(at, 1), length, b""
            case "zeros":
                change = at, 64, bytes(min(64, length - at))
            case "insert":
                change = at, 0, draw(st.binary(min_size=1, max_size=9))
        changes.append(change)
        length = max(1, length - min(change[1], length - change[0]) + len(change[2]))
    return Damage(raw, changes)


@dataclass
class Gguf:
    """A GGUF file in parts: values of the metadata as bytes, and kind, shape and bytes of each tensor."""

    values: list[tuple[str, bytes]]
    tensors: list[tuple[str, list[int], int, bytes]]
    version: int = 3
    order: str = "<"

    def __repr__(self):
        values = [(key, value[:40]) for key, value in self.values]
        return f"Gguf({values}, {_listed(self.tensors)}, {self.version}, {self.order!r})"

    @classmethod
    def made_of(cls, state_dict):
        """float32, in the layout of city96's conversions."""
        values = [("general.architecture", struct.pack("<IQ3s", 8, 3, b"wan"))]
        tensors = []
        for name, value in state_dict.items():
            shape = list(value.shape)
            if len(shape) > 4:
                sides = struct.pack(f"<IIQ{len(shape)}I", 9, 4, len(shape), *shape)
                values.append((f"comfy.gguf.orig_shape.{name}", sides))
                shape = [value.numel()]
            tensors.append((name, shape[::-1], 0, value.numpy().tobytes()))
        return cls(values, tensors)

    @classmethod
    def of(cls, path):
        import gguf

        reader = gguf.GGUFReader(path)
        values = [
            (k, b"".join(bytes(p) for p in f.parts[2:])) for k, f in reader.fields.items() if "." in k[1:]
        ]
        values = [(key, value) for key, value in values if not key.startswith("GGUF.")]
        tensors = [
            (t.name, [int(n) for n in t.shape], int(t.tensor_type), t.data.tobytes()) for t in reader.tensors
        ]
        return cls(values, tensors)

    def raw(self):
        def text(value):
            value = value.encode("utf-8", "surrogatepass")
            return struct.pack("<Q", len(value)) + value

        head = b"GGUF" + struct.pack(f"{self.order}IQQ", self.version, len(self.tensors), len(self.values))
        head += b"".join(text(key) + value for key, value in self.values)
        data = b""
        for name, shape, kind, content in self.tensors:
            head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
            data += content + bytes(-len(content) % 32)
        return head + bytes(-len(head) % 32) + data


def archive(raw, packed=False):
    """A file as of torch.save with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as made:
        made.writestr("a/data.pkl", raw)
        made.writestr("a/version", "3\n")
    return file.getvalue()


def tuples(count, width):
    """A pickle of a table with one key: tuples in tuples, each the one before so many times."""
    within = b"".join(b"(" + bytes([ord("h"), k]) * width + b"tq" + bytes([k + 1]) for k in range(count))
    return b"\x80\x02})q\0" + within + b"K\x01s."


VALUES = [
    struct.pack("<IIQ", 9, 0, 2**62), struct.pack("<IIQ", 9, 8, 2**40), struct.pack("<IIQ", 9, 9, 1),
    struct.pack("<IB", 0, 7), struct.pack("<IQ", 10, 2**63), struct.pack("<If", 6, math.nan),
    struct.pack("<I", 99),
    struct.pack("<IIQi", 9, 5, 1, -3), struct.pack("<IIQ", 9, 5, 0), struct.pack("<IQ", 8, 2) + b"\xff\xfe",
]  # fmt: skip
KEYS = [
    "general.alignment", "general.architecture", "comfy.gguf.orig_shape.patch_embedding.weight",
    "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.model", "x",
]  # fmt: skip
KINDS = [0, 1, 2, 4, 8, 12, 16, 23, 26, 30, 39, 99]
GGUF_SHAPES = [[0], [4, 0], [2**32, 2**32], [33], [2**63], [1, 1, 1, 1], [2**20, 2**20, 2**20], []]


@st.composite
def changed_gguf(draw, base):
    """A GGUF whose head states other things than its model."""
    values, tensors, version, order = list(base.values), list(base.tensors), 3, "<"
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(tensors) - 1))
        name, shape, kind, data = tensors[at]
        match draw(st.sampled_from(["value", "shape", "kind", "name", "drop", "twice", "cut", "version"])):
            case "value":
                key = draw(st.sampled_from(KEYS))
                values = [item for item in values if item[0] != key] + [(key, draw(st.sampled_from(VALUES)))]
            case "shape":
                tensors[at] = (
                    name,
                    draw(st.sampled_from([*GGUF_SHAPES, shape[::-1], [*shape, 1]])),
                    kind,
                    data,
                )
            case "kind":
                tensors[at] = (
                    name,
                    shape,
                    draw(st.sampled_from(KINDS)),
                    data,
                )
            case "name":
                parts = name.split(".")
                numbers = [i for i, part in enumerate(parts) if part.isdigit()] or [0]
                parts[numbers[0]] = draw(st.sampled_from([*NUMBERS, "\ud800", "x" * 600]))
                tensors[at] = ".".join(parts), shape, kind, data
            case "drop":
                del tensors[at]
            case "twice":
                tensors.append(tensors[at])
            case "cut":
                tensors[at] = name, shape, kind, data[: len(data) // 2]
            case "version":
                version, order = draw(st.sampled_from([(1, "<"), (2, "<"), (3, ">"), (2**31, "<")]))
    return Gguf(values, tensors, version, order)
