from __future__ import annotations

import torch

from model.compression.resume import ResultCache


def test_a_damaged_piece_is_computed_again(tmp_path, capsys):
    cache, computed = ResultCache(tmp_path), []

    def compute() -> dict[str, torch.Tensor]:
        computed.append(1)
        return {"scores": torch.arange(50.0)}

    for damage in (None, lambda content: content[:-40], lambda content: content[:90] + b"?" + content[91:]):
        if damage:
            path = tmp_path / "importance.pt"
            path.write_bytes(damage(path.read_bytes()))
        for _ in range(2):
            assert torch.equal(cache.once("importance", compute)["scores"], torch.arange(50.0))
    assert len(computed) == 3 and capsys.readouterr().out.count("importance.pt: damaged; made again.") == 2
