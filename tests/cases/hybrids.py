"""Hybrids: layers of different kinds in one stack, said by a pattern."""

from case_table import CausalCase

MODELS = {
    "s4d + window": CausalCase(name="s4", fields={"d_state": 8, "pattern": "s4, attention(window=7, n_heads=2)"}),
    "deltanet + window": CausalCase(name="deltanet", fields={"pattern": "deltanet, attention(window=7, n_heads=2)"}),
    "mamba2 + window": CausalCase(
        name="mamba2", fields={"pattern": "mamba2(d_state=8, head_dim=16), attention(window=7, n_heads=2)"}
    ),
    "slstm + window": CausalCase(name="slstm", fields={"pattern": "slstm, attention(window=7, n_heads=2)"}),
    "gated_deltanet + gla": CausalCase(
        name="gated_deltanet", fields={"head_dim": 12, "pattern": "gated_deltanet, gla(n_heads=2)"}
    ),
}
