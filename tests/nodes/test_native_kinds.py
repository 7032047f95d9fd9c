"""Files of the host's own classes, picked in the wrong loader, are called by their names."""

import pytest
from comfy.ldm.wan.vae2_2 import WanVAE as NativeVAE22
from comfy.taesd.taehv import TAEHV
from helpers_checkpoint import meta_state_dict, with_prefix
from wan21.wan import files as ck

VAE22 = {"z_dim": 48, "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
WRONG_FILES = {
    "wan22_vae": (lambda: NativeVAE22(dim=16, **VAE22), r"Wan2\.2 VAE \(48 latent channels\)"),
    "tae": (lambda: TAEHV(latent_channels=16), "TAEHV"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
@pytest.mark.parametrize("rename", [ck.to_wan_dit_keys, ck.to_wan_vae_keys, ck.to_umt5_keys])
def test_each_loader_names_the_wrong_file(rename, case):
    build, words = WRONG_FILES[case]
    weights = meta_state_dict(build)
    for prefix in ("", "some.prefix."):
        kind = ck.detect_kind(with_prefix(prefix, weights))
        assert kind.name == case
    with pytest.raises(ValueError, match=words) as error:
        rename(weights)
    assert str(error.value).endswith(f"It is {kind.what}; {kind.fix}.")
