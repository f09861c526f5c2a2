"""The same text in fewer forwards: drafts from the text itself, decided on by one forward each. About 10 seconds.

    python examples/speculative_decoding.py

The same by the command line: zoo generate RUN --prompt "..." --stats decoder=speculative decoder.gamma=6.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch.nn import functional as F

import zoo
from zoo.decoding import Piece, Sampling, Session, Speculative, sampling, speculative
from zoo.tokenizers import ByteTokenizer

TEXT = "".join(f"    self.{name} = nn.Linear(d_model, {size}, bias=False)\n" for size in ("d", "2 * d", "n_heads")
               for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))  # fmt: skip
PROMPTS = ["    self.q_proj = nn.", "    self.v", "    self.gate_proj = nn.Linear(d_model, d, bias=False)\n    self.up"]


def trained() -> zoo.layers.SequenceModel:
    """A hybrid of a recurrent layer and one of attention that knows TEXT a little."""
    torch.manual_seed(0)
    model = zoo.create_model(
        "deltanet", pattern="deltanet, attention(window=48, n_heads=2)", d_model=64, n_layers=2, hidden_size=128,
        n_heads=2, vocab_size=257, tie_embeddings=True,
    )  # fmt: skip
    assert isinstance(model, zoo.layers.SequenceModel)
    ids = torch.tensor(ByteTokenizer().encode(TEXT))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        starts = torch.randint(len(ids) - 129, (8,))
        batch = torch.stack([ids[start : start + 129] for start in starts.tolist()])
        loss = F.cross_entropy(model(batch[:, :-1])[0].flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"trained: loss {loss.item():.2f}")
    return model.double().eval()  # in float64 a chunk of tokens and single ones round alike


def told(pieces: Iterator[Piece]) -> tuple[list[list[int]], Counter[str]]:
    """What the rows gained, and the sums of what the pieces count."""
    rows: list[list[int]] = [[] for _ in PROMPTS]
    sums: Counter[str] = Counter()
    for piece in pieces:
        for row, new in zip(rows, piece.tokens, strict=True):
            row.extend(new)
        sums.update(piece.info)
    return rows, sums


def main() -> None:
    model, tokenizer = trained(), ByteTokenizer()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]  # of different lengths, in one batch
    plain, base = told(sampling(model, prompts, Sampling(max_tokens=96, temperature=0)))
    drafted, sums = told(speculative(model, prompts, Speculative(max_tokens=96, temperature=0, gamma=6)))
    assert drafted == plain, "greedy speculation changes no token"
    print(repr(PROMPTS[1] + tokenizer.decode(drafted[1])[:60]))
    print(f"{base['forwards']} forwards one token at a time, {sums['forwards']} with drafts: "
          f"{base['forwards'] - sums['forwards']} forwards saved, "
          f"{sums['accepted']} of {sums['proposed']} drafted tokens accepted")  # fmt: skip

    session = Session(model)  # what decoders are made of
    session.begin(prompts)
    session.propose([plain[0][:5], plain[1][:3], []])  # ragged, and nothing in the last row
    session.commit([5, 1, 0])  # the first row keeps all of its window, the second one token
    assert [len(row) for row in session.tokens] == [len(prompts[0]) + 5, len(prompts[1]) + 1, len(prompts[2])]
    following = session.extend([[], plain[1][1:2], []])[1, -1].argmax().item()
    assert following == plain[1][2], "rejected tokens leave no trace"
    print("a session took back what was rejected")


if __name__ == "__main__":
    main()
