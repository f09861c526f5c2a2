"""encoder_decoder: what its proofs need."""

from case_table import EncoderDecoderCase

MODELS = {
    "encoder_decoder": EncoderDecoderCase(fields={"n_encoder_layers": 1}),
    "encoder_decoder, hybrid": EncoderDecoderCase(
        fields={
            "pattern": "deltanet(n_heads=2), attention(window=5)",
            "encoder_pattern": "hydra(head_dim=16, d_state=4), gru",
            "source_vocab_size": 20,
            "tie_embeddings": True,
        },
        name="encoder_decoder",
    ),
}
