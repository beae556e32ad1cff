"""From the configuration to what the loop works with."""

import torch

from fastssl import distributed
from fastssl.models import MaskedAutoencoderHiera
from fastssl.training import setup
from tests.training.tiny import tiny_config


@torch._dynamo.config.patch(recompile_limit=8)
def test_every_kind_of_block_is_compiled():
    torch._dynamo.reset()
    sizes = {"input_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (2, 3, 3, 2)}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 3, "decoder_num_heads": 2}
    model = MaskedAutoencoderHiera(**sizes, **decoder)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    setup.compile_each(distributed.blocks(model), backend=backend)
    images = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        model(images, 0.5)[0].backward()
    # Stage 1; the first and the rest of three more; the decoder's, and its last one.
    assert len(graphs) == 9
    with torch.no_grad():
        model.features(images)
    assert len(graphs) == 16
    torch._dynamo.reset()


def test_automatic_precision_takes_no_emulated_bf16(tmp_path, monkeypatch):
    """torch says that it supports bf16 on GPUs that compute it in float32, several times slower."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    config = tiny_config(tmp_path, tmp_path, "train.precision=auto")
    assert not setup.uses_bf16(config, torch.device("cuda"))
