"""The benchmark of whole graphs runs ours and the host's on the same files, and both write a video."""

from lib import graph_race


def test_ours_and_the_hosts_own_nodes(server):
    seconds = graph_race.race(server, 64, 5, steps=1, repeat=1, in_bf16=True)
    assert seconds.keys() == {"ours", "ours bf16", "native"} and min(seconds.values()) > 0


def test_the_hosts_graph_has_none_of_our_nodes_but_the_text_encoder():
    kinds = {node["class_type"] for node in graph_race.native_graph(64, 5, 20).values()}
    assert {kind for kind in kinds if kind.startswith("Wan21")} == {"Wan21TextEncoderLoader"}
    assert {"UNETLoader", "VAELoader", "WanImageToVideo", "KSampler", "VAEDecode"} <= kinds
