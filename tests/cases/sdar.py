"""SDAR: what its proofs need."""

from case_table import CausalCase

MODELS = {"sdar": CausalCase(published={"1.7b": 2_031_739_904, "4b": 4_411_424_256, "8b": 8_190_735_360})}
