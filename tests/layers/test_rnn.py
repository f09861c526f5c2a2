"""The recurrent mixers: LSTM against torch's, and how the sLSTM starts."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from zoo.layers import LSTM, SLSTM


def test_a_mixer_of_one_head_is_torchs_lstm_normalised_and_projected() -> None:
    torch.manual_seed(0)
    mixer, theirs = LSTM(12, n_heads=1).double(), nn.LSTM(12, 12, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(mixer.in_proj.weight)
        theirs.weight_hh_l0.copy_(mixer.R.view(48, 12))
        theirs.bias_ih_l0.copy_(mixer.b.flatten())
        theirs.bias_hh_l0.zero_()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    y, state = mixer(x)
    h, (_, c) = theirs(x)
    assert_close(y, mixer.out_proj(F.layer_norm(h, (12,))))
    assert_close(state.cell[:, 1, 0], c[0])


def test_the_slstm_starts_without_recurrence_and_deeper_layers_remember_longer() -> None:
    model = zoo.create_model("slstm", d_model=16, n_layers=3, n_heads=2, vocab_size=11, pattern="slstm")
    j = torch.arange(8) / 7
    for block, power in zip(model.blocks, (0.3, 0.95, 1.6), strict=True):
        mixer = block.mixer
        assert isinstance(mixer, SLSTM)
        assert_close(mixer.b[1], (5 - 12 * j**power).expand(2, 8))
        assert not mixer.R.any()
        assert not mixer.b[[0, 2, 3]].any()
