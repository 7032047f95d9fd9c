"""Every node of the running host and of other packs that takes a MODEL: ours beside the native one."""

from .graphs import (
    BEFORE,
    STARTED,
    WITH_MASK,
    Missing,
    base,
    host_sampled,
    inputs_for,
    node,
    our_sampled,
    sampled_over_our_sigmas,
    specs,
)
from .rows import ACTS, AS_NATIVE, EQUAL, NOT_TRIED, SILENT, Row, Verdict, compare, distance

ROUNDS = ("ModelComputeDtype",)


class ModelNodes:
    """Nodes that take a MODEL, of the host or of one pack.

    Args:
        pack: name of its folder among the custom nodes; None for the host's own.
    """

    headings = ("node", "natively", "our MODEL, the host's KSampler", "our MODEL, Wan21Sampler")

    def __init__(self, pack=None):
        self.pack = pack
        self.title = f"Nodes of {pack} that take a MODEL" if pack else "Nodes of the host that take a MODEL"
        self.about = (
            "Every node class that takes a MODEL, with its own defaults or values that act on a small model. "
            "A node that gives a MODEL is followed by the host's KSampler (Euler, simple) and by "
            "Wan21Sampler (Euler), whose reference is the host's Euler over the same noise levels on the "
            "native MODEL; another node by what its output is for. Figures: norm of the difference over "
            "the norm."
        )

    def missing(self, bench):
        """Why the section cannot be run here, or None."""
        if self.pack is not None and self.pack not in {pack.name for pack in bench.packs}:
            return "not tried: the pack was not given (--packs)"
        return None if self.names(bench) else "It has none; its loaders stand with the other loaders."

    def prepare(self, bench, names):
        """Nothing."""

    def names(self, bench):
        """Node ids, in order."""
        return sorted(filter(lambda name: self._takes_model(bench.nodes[name]), bench.nodes))

    def _takes_model(self, info):
        module = info["python_module"]
        mine = module == f"custom_nodes.{self.pack}" if self.pack else not module.startswith("custom_nodes.")
        return mine and any("MODEL" in str(kind).split(",") for _, kind, _, _ in specs(info))

    def row(self, bench, name):
        """Try one of them."""
        info = bench.nodes[name]
        try:
            inputs = inputs_for(info)
        except Missing as missing:
            return Row(name, "", [Verdict(NOT_TRIED, str(missing)), Verdict(NOT_TRIED)])
        added = {"tried": node(name, **inputs)}
        if name in BEFORE:
            added["before"] = node(BEFORE[name], **inputs_for(bench.nodes[BEFORE[name]]))
        if "MODEL" in info["output"]:
            return patch_row(bench, name, added)
        return user_row(bench, name, added)


def patch_row(bench, name, added):
    """A node that gives a MODEL."""
    model, conditioning, latent = _ends(bench.nodes[name])

    def run(kind, finish):
        start = ["masked", 0] if name in WITH_MASK else ["start", 2]

        def plainly():
            return bench.run(finish(base(kind), ["model", 0], latent=start), ["sampled", 0])

        graph = finish(base(kind) | added, model, conditioning, latent or start)
        return bench.once((kind, finish, *start), plainly), bench.run(graph, ["sampled", 0])

    plain, native = run("native", host_sampled)
    our_plain, ours = run("ours", host_sampled)
    plain_reference, reference = run("native", sampled_over_our_sigmas)
    plain_sampled, sampled = run("ours", our_sampled)
    by_host = compare(native, ours, said=_new(our_plain, ours))
    by_us = compare(reference, sampled, said=_new(plain_sampled, sampled))
    if name in ROUNDS:
        by_host = _rounded(by_host, _share(plain, native), _share(our_plain, ours))
        by_us = _rounded(by_us, _share(plain_reference, reference), _share(plain_sampled, sampled))
    if by_us.word == EQUAL and _acts(plain, native) and not _acts(plain_reference, reference):
        by_us = Verdict(SILENT, "it changes the noise levels natively, and not those of Wan21Sampler")
    return Row(name, _effect(plain, native), [by_host, by_us])


def _rounded(verdict, native, ours):
    """Of a node that rounds: two roundings differ, and ours may lie no farther from float32."""
    if verdict.word != SILENT or None in (native, ours) or not ACTS < ours <= native:
        return verdict
    return Verdict(EQUAL, f"rounded as asked: {ours:.0e} from float32, natively {native:.0e}")


def _new(plain, patched):
    return [note for note in patched.notes if note not in plain.notes]


def _ends(info):
    """Links to what the node gives: MODEL, both CONDITIONINGs (else the graph's), LATENT (else None)."""
    outputs = info["output"]
    first = outputs.index("CONDITIONING") if outputs.count("CONDITIONING") == 2 else None
    pair = STARTED if first is None else (["tried", first], ["tried", first + 1])
    latent = ["tried", outputs.index("LATENT")] if "LATENT" in outputs else None
    return ["tried", outputs.index("MODEL")], pair, latent


def _share(plain, patched):
    """How far a patch moves the result, of its norm; None: other shapes, NaN or an error."""
    apart = distance(patched.tensors, plain.tensors)
    return apart and apart[1]


def _acts(plain, patched):
    share = _share(plain, patched)
    return share is None or share > ACTS


def _effect(plain, patched):
    if patched.error:
        return f"fails: {patched.error}"
    if not _acts(plain, patched):
        return "no effect"
    share = _share(plain, patched)
    return "acts" if share is None else f"acts ({share:.0e})"


def user_row(bench, name, added):
    """A node that gives something else: its output, what a sampler makes of it, or the file it writes."""
    outputs = bench.nodes[name]["output"]

    def run(kind):
        graph, links = base(kind) | added, [["tried", i] for i in range(len(outputs))]
        if outputs[:1] == ["GUIDER"]:
            graph["sampled"] = node(
                "SamplerCustomAdvanced", noise=["noise", 0], guider=["tried", 0], sampler=["sampler", 0],
                sigmas=["sigmas", 0], latent_image=["start", 2],
            )  # fmt: skip
            links = [["sampled", 0]]
        elif outputs[:1] == ["SAMPLER"]:
            graph = sampled_over_our_sigmas(graph, ["model", 0])
            graph["sampled"]["inputs"]["sampler"] = ["tried", 0]
            links = [["sampled", 0]]
        outcome = bench.run(graph, *links)
        outcome.tensors = _multiplied(outcome.tensors)
        return outcome

    native, ours = run("native"), run("ours")
    verdict = compare(native, ours, said=ours.notes)
    if verdict.word == SILENT:
        bench.server.client.free()  # else the host would have the first result at hand
        again = compare(native, run("native"))
        verdict = (
            Verdict(AS_NATIVE, f"natively two runs differ too: {again.detail}")
            if again.word == SILENT
            else verdict
        )
    if verdict.word == EQUAL and not native.tensors and not native.error:
        verdict = Verdict(AS_NATIVE, "it gives nothing to compare")
    return Row(name, f"fails: {native.error}" if native.error else "runs", [verdict, Verdict("-")])


def _multiplied(tensors):
    """The products of a LoRA's factors in place of the factors, which are many for one product."""
    found = dict(tensors)
    for key in tensors:
        down = key.replace("lora_up", "lora_down")
        if "lora_up" in key and down in tensors:
            found[key] = tensors[key].float().flatten(1) @ found.pop(down).float().flatten(1)
    return found
