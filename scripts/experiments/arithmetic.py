"""What a Transformer with experts has and needs, worked out from widths, layers and vocabulary.

Written from the method, not read off the model: `costs.py` compares it with what a model really has.
"""

from collections import Counter
from math import comb

from experiments.dimensions import Parts, Shape, Stack

ALIGNMENT = 16  # bytes: of columns that the grouped product needs, the first of which is a bias
STATISTICS = 8  # bytes that a normalisation keeps of each token
INDICES = 28  # bytes of a routed row: three places (int64) and a weight
LOGIT = 4  # bytes: the log-probabilities, in fp32


def ffn(model_dim: int, inner_dim: int) -> int:
    """Weights and biases."""
    return 2 * model_dim * inner_dim + inner_dim + model_dim


def attention(stack: Stack, source_dim: int) -> int:
    """Weights and biases of q and the output, of k and v."""
    return 2 * (stack.model_dim**2 + stack.model_dim) + 2 * (source_dim * stack.model_dim + stack.model_dim)


def parameters(shape: Shape) -> Parts:
    """Numbers that a rank holds."""
    found: Parts = Counter(embeddings=shape.embeddings * shape.vocabulary * shape.embedding_dim)
    found["embeddings"] += projections(shape)
    for stack in shape.stacks:
        width, moe = stack.model_dim, stack.moe_layers
        own, dense = attention(stack, width), ffn(width, stack.ffn_dim)
        found["embeddings"] += stack.learned_positions * width
        found["attention"] += stack.layers * own
        found["dense FFNs"] += stack.dense_layers * dense
        norms = stack.layers * (3 if stack.memory_dim else 2) + stack.prenorm + stack.embedding_norm
        found["norms"] += norms * 2 * width
        if stack.memory_dim:
            found["attention"] += stack.layers * attention(stack, stack.memory_dim)
        if stack.unused:
            found["unused copies"] += stack.dense_layers * (own + dense)
        found["experts"] += moe * shape.held * ffn(width, shape.expert_dim(stack))
        found["routers"] += moe * router_parameters(shape, width)
        found["beside experts"] += moe * beside_experts(shape, stack)
    return +found


def projections(shape: Shape) -> int:
    """From embeddings of another width, and back."""
    width, wanted = shape.embedding_dim, shape.stacks[-1].model_dim
    return 2 * width * wanted if width != wanted else 0


def router_parameters(shape: Shape, width: int) -> int:
    scored = shape.experts + shape.cheap_experts
    return {"hash": 0, "topany": scored * (width + 1)}.get(shape.router, scored * width)


def beside_experts(shape: Shape, stack: Stack) -> int:
    """Shared experts, a bias for all, and what constant ones learn."""
    width, shared = stack.model_dim, shape.shared_experts * shape.expert_dim(stack)
    constants = 3 * shape.constant_experts * width  # a vector, and two columns that mix it
    return (ffn(width, shared) if shared else 0) + constants + shape.output_bias * width


def flops(shape: Shape, per_token: float) -> Parts:
    """Of a forward pass of the batch: multiply-adds x 2, and of matrix products alone.

    Args:
        per_token: k, mean number of routed experts.
    """
    found: Parts = Counter()
    for stack in shape.stacks:
        tokens, width = shape.tokens(stack), stack.model_dim
        found["attention"] += stack.layers * (8 * width**2 + 4 * stack.length * width) * tokens
        if stack.memory_dim:
            read = shape.tokens(shape.stacks[0])
            found["attention"] += stack.layers * 4 * width * (width * tokens + stack.memory_dim * read)
            found["attention"] += stack.layers * 4 * shape.stacks[0].length * width * tokens
        found["dense FFNs"] += stack.dense_layers * 4 * width * stack.ffn_dim * tokens
        found["routers"] += stack.moe_layers * 2 * router_products(shape, width) * tokens
        inner, beside = 4 * width * shape.expert_dim(stack), stack.moe_layers * tokens
        found["experts"] += stack.moe_layers * round(per_token * tokens) * inner
        found["beside experts"] += beside * (
            shape.shared_experts * inner + 6 * width * shape.constant_experts
        )
    last = shape.stacks[-1]
    output = shape.embedding_dim * shape.vocabulary + projections(shape)
    found["output layer"] = 2 * output * shape.tokens(last)
    return +found


def router_products(shape: Shape, width: int) -> int:
    return 0 if shape.router == "hash" else (shape.experts + shape.cheap_experts) * width


def bias_columns(shape: Shape, per_token: float) -> int:
    """FLOPs of the columns that the grouped product has more, for biases: nothing that a model needs."""
    columns = 2 * ALIGNMENT // shape.itemsize
    return sum(
        stack.moe_layers
        * round(per_token * shape.tokens(stack))
        * columns
        * (stack.model_dim + shape.expert_dim(stack))
        for stack in shape.stacks
    )


def activations(shape: Shape, per_token: float) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the logits."""
    kept = sum(shape.tokens(stack) * stack_activations(shape, stack, per_token) for stack in shape.stacks)
    between = 2 * shape.itemsize * shape.embedding_dim * bool(projections(shape))
    return round(kept + between * shape.tokens(shape.stacks[-1]))


def stack_activations(shape: Shape, stack: Stack, per_token: float) -> float:
    """Bytes of a token.

    A block keeps what its normalisation reads, its own input and dropout's mask. Attention: q, k, v, the
    heads' output as it comes and as the last product reads it, and a number for each head; where it looks
    into the encoder, in fairseq's own way, each head's probabilities in fp32 and again after dropout. An FFN:
    what the activation gives; gelu's input in fp32. An MoE layer: pre-activations and places of rows, scores.
    """
    b, width, inner = shape.itemsize, stack.model_dim, stack.ffn_dim
    mask, norm = width * bool(shape.dropout), b * width + STATISTICS
    block = b * width + mask + norm
    attends = block + 5 * b * width + 4 * stack.heads
    looks = block + 4 * b * width + stack.heads * shape.stacks[0].length * (4 + b) if stack.memory_dim else 0
    drops = inner * (b + 1) * bool(shape.activation_dropout)
    dense = block + b * inner + drops + (0 if shape.relu else 4 * inner)
    rows = per_token * (b * shape.expert_dim(stack) + INDICES)
    moe = block + rows + 8 * (shape.experts + shape.cheap_experts) + 16
    moe += 8 * width * (shape.router == "topany")  # it scores by cosine, in fp32
    beside = b * width + mask + norm * stack.prenorm
    return stack.layers * (attends + looks) + stack.dense_layers * dense + stack.moe_layers * moe + beside


def logits(shape: Shape) -> int:
    """Bytes that the criterion keeps. Their gradients are as much, twice, when the backward pass begins."""
    return LOGIT * shape.vocabulary * shape.tokens(shape.stacks[-1])


def ranks_of_a_token(ranks: int, experts: int, per_token: float) -> float:
    """On how many of N ranks the k experts of a token lie (docs/scaling.md)."""
    return ranks * (1 - comb(experts - experts // ranks, round(per_token)) / comb(experts, round(per_token)))
