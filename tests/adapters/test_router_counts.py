"""How many experts a placement must know of: as many as the routers choose among, whatever the configuration calls them."""

import pytest
from torch import nn

from pikv_ds.adapters.hf.anatomy import anatomy
from pikv_ds.adapters.hf.router_output import count_router_experts, find_routers
from tests.survey.configs import tiny_config, tiny_model


@pytest.mark.parametrize("family, experts", [("aria_text", 8), ("longcat_flash", 10), ("phimoe", 8), ("llama", None)])
def test_rows_of_the_routers(family, experts):
    """longcat_flash: eight, and two that do nothing."""
    layers = anatomy(tiny_model(tiny_config(family))).layers
    assert count_router_experts(find_routers(layers)) == experts


def test_a_layer_with_two_attention_modules_names_its_experts_once():
    layers = anatomy(tiny_model(tiny_config("longcat_flash"))).layers
    assert [router is not None for router in find_routers(layers)] == [True, False] * (len(layers) // 2)


def test_a_router_that_says_it_itself():
    class OwnTopKRouter(nn.Module):
        num_experts = 6

    assert count_router_experts([OwnTopKRouter(), None]) == 6
