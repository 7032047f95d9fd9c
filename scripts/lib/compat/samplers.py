"""The samplers and schedulers of the host's KSampler with our MODEL, beside the native one."""

from .graphs import base, host_sampled
from .rows import Row, compare

SCHEDULERS = ("simple", "normal", "beta")


class Samplers:
    """Every sampler with three schedulers, and every scheduler with Euler."""

    title = "The host's samplers and schedulers"
    headings = ("sampler", "schedulers", "our MODEL beside the native one")
    about = (
        "KSampler with our MODEL and with the native one: every sampler of its list with three schedulers, "
        "the worst of them shown, and every other scheduler with Euler."
    )

    def missing(self, bench):
        return None

    def prepare(self, bench, names):
        """Nothing."""

    def names(self, bench):
        samplers, schedulers = (_choices(bench, of) for of in ("sampler_name", "scheduler"))
        return samplers + [f"euler, {name}" for name in schedulers if name not in SCHEDULERS]

    def row(self, bench, name):
        """Sample with one of them."""
        sampler, _, scheduler = name.partition(", ")
        schedulers = (scheduler,) if scheduler else SCHEDULERS
        outcomes = [bench.run(*_graph(kind, sampler, schedulers)) for kind in ("native", "ours")]
        return Row(name, ", ".join(schedulers), [compare(*outcomes)])


def _choices(bench, name):
    kind, *options = bench.nodes["KSampler"]["input"]["required"][name]
    return list(kind if isinstance(kind, list) else options[0]["options"])


def _graph(kind, sampler, schedulers):
    graph, links = base(kind), []
    for i, scheduler in enumerate(schedulers):
        sampled = host_sampled({}, ["model", 0])["sampled"]
        sampled["inputs"] |= {"sampler_name": sampler, "scheduler": scheduler}
        graph[f"sampled{i}"] = sampled
        links.append([f"sampled{i}", 0])
    return graph, *links
