"""Loaders of the host and of other packs in front of our nodes."""

from ..random_checkpoints import I2V, VAE
from . import layouts
from .checkpoints import LORA
from .graphs import (
    GGUF,
    WHOLE,
    Missing,
    base,
    host_sampled,
    inputs_for,
    node,
    our_lora,
    our_sampled,
    sampled_over_our_sigmas,
    specs,
)
from .rows import NOT_TRIED, Row, Verdict, compare

LOADED = {"MODEL", "VAE"}


def make_loaded(models):
    """Write a GGUF and a whole-pipeline file, for the loaders that read such."""
    from safetensors.torch import load_file

    weights = load_file(models / "diffusion_models" / I2V)
    layouts.gguf_dit("Q8_0")(models / "diffusion_models" / GGUF, weights)
    (models / "checkpoints").mkdir()
    # Without a text encoder: the host takes umT5-XXL alone there.
    layouts.all_in_one({"vae": VAE})(models / "checkpoints" / WHOLE, weights)


class Loaders:
    """Every node that gives a MODEL or a VAE from a file."""

    title = "Other loaders in front of our nodes"
    headings = (
        "loader",
        "natively",
        "its MODEL in Wan21Sampler",
        "in Wan21LoraLoader",
        "its VAE in Wan21VAEDecode",
    )
    about = (
        "Every node that gives a MODEL or a VAE and takes none, on a small file, followed by our nodes; "
        "beside them the host's Euler over the same noise levels, LoraLoaderModelOnly and VAEDecode."
    )

    def missing(self, bench):
        return None

    def names(self, bench):
        return sorted(filter(lambda name: self._loads(bench.nodes[name]), bench.nodes))

    def _loads(self, info):
        takes = {part for _, kind, _, _ in specs(info) for part in str(kind).split(",")}
        ours = info["name"].startswith(("Wan21", "Probe"))
        return bool(LOADED & set(info["output"])) and not takes & (LOADED | {"LATENT"}) and not ours

    def prepare(self, bench, names):
        """Nothing: a loader's list of files is read when the host starts."""

    def row(self, bench, name):
        """Try one of them."""
        info = bench.nodes[name]
        try:
            inputs = inputs_for(info)
        except Missing as missing:
            return Row(name, "", [Verdict(NOT_TRIED, str(missing)), Verdict("-"), Verdict("-")])
        file = next((str(v) for v in inputs.values() if str(v).endswith((".safetensors", ".gguf"))), "")
        graph = base("native") | {"tried": node(name, **inputs)}
        outputs, verdicts, errors = info["output"], [Verdict("-")] * 3, []
        if "MODEL" in outputs:
            verdicts[:2] = _model(bench, graph, ["tried", outputs.index("MODEL")], errors)
        if "VAE" in outputs:
            verdicts[2] = _vae(bench, graph, ["tried", outputs.index("VAE")], errors)
        return Row(name, "; fails: ".join([file, *dict.fromkeys(errors)][:2]), verdicts)


def _model(bench, graph, model, errors):
    native = bench.run(sampled_over_our_sigmas(graph, model), ["sampled", 0])
    errors += [native.error] if native.error else []
    yield compare(native, bench.run(our_sampled(graph, model), ["sampled", 0]))
    theirs = node("LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=0.7)
    both = (
        host_sampled(graph | {"lora": lora}, ["lora", 0]) for lora in (theirs, our_lora(model, LORA, 0.7))
    )
    yield compare(*(bench.run(whole, ["sampled", 0]) for whole in both))


def _vae(bench, graph, vae, errors):
    graph = graph | {"encoded": node("VAEEncode", pixels=["pictures", 0], vae=vae)}
    theirs = node("VAEDecode", samples=["encoded", 0], vae=vae)
    ours = node("Wan21VAEDecode", latent=["encoded", 0], vae=vae, tile_size="auto")
    outcomes = [bench.run(graph | {"decoded": end}, ["decoded", 0]) for end in (theirs, ours)]
    errors += [outcomes[0].error] if outcomes[0].error else []
    return compare(*outcomes, pictures=True)
