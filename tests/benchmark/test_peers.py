"""Other engines in the benchmark: they compute the same network, or are left out by name."""

import sys

import pytest
import torch
from builders import NORMALISATION, make_split, trained

from pipeline.benchmark.full_resnet_forms import full_resnet_forms
from pipeline.benchmark.peers import PEERS
from pipeline.inference.base import Networks, UnavailableError
from pipeline.models.resnet_cifar import cifar_resnet


@pytest.fixture(scope="module")
def networks() -> Networks:
    resnet = trained(cifar_resnet(depth=14, width=8, num_classes=3), seed=0)
    return Networks(resnet=resnet, policy_net=None, normalisation=NORMALISATION)


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_gives_what_the_eager_form_gives(name, networks):
    images = make_split(33, size=16).images
    forms = full_resnet_forms(networks, "fp32", with_compile=False)
    eager, peer = forms["eager"](), forms[name]()
    for batch in (1, 7, 33, 1):  # 33 does not split into equal streams
        torch.testing.assert_close(peer(images[:batch]), eager(images[:batch]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_not_installed_says_how_to_install_it(name, networks, monkeypatch):
    monkeypatch.setitem(sys.modules, PEERS[name].package, None)
    with pytest.raises(UnavailableError, match="is not installed; `make peers` installs it"):
        PEERS[name](networks, "fp32")


def test_onnx_runtime_has_no_bf16(networks):
    with pytest.raises(UnavailableError, match="no convolution in this precision"):
        PEERS["ONNX Runtime"](networks, "bf16")
