# %% [markdown]
# # An MoE layer in a training loop of your own
#
# A toy task in plain torch: some inputs are easy, some hard, and a token takes as many experts as it needs.
#
#     python examples/training_loop.py
#
# It takes some seconds on one core, and draws training_loop.png. The cells (`# %%`) are jupytext's, which
# makes a notebook of them: `jupytext --to notebook`.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe_fairseq.moe import MoELayer, Router, Routing, ThresholdRouter, register_router, step_budgets

SKILLS, WIDTH, EXPERTS, UPDATES = 8, 32, 16, 300
torch.manual_seed(1)

# %% [markdown]
# ## The task
#
# There are eight functions. An easy token wants one of them, a hard one the mean of four; it says which, and
# for what argument.

# %%
functions_SIO = torch.randn(SKILLS, 8, 8)


def batch(tokens: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """(T, 16) tokens, (T, 8) what is wanted of them, and (T,) how many functions that takes."""
    wanted_T = torch.where(torch.rand(tokens) < 0.5, 1, 4)
    asks_TS = (torch.rand(tokens, SKILLS).argsort(1).argsort(1) < wanted_T.unsqueeze(1)).float()
    argument_TI = torch.randn(tokens, 8)
    values_TSO = torch.tanh(torch.einsum("ti,sio->tso", argument_TI, functions_SIO))
    target_TO = torch.einsum("ts,tso->to", asks_TS, values_TSO) / wanted_T.unsqueeze(1)
    return torch.cat([asks_TS, argument_TI], dim=1), target_TO, wanted_T


# %% [markdown]
# ## The model and the loop
#
# `MoELayer` gives what the experts make of `x (..., D)`, and the `Routing`: which token took which experts,
# and the auxiliary losses. A call of `step_budgets` after each update steers t to the budget.


# %%
class Model(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 8)
        self.moe = MoELayer(WIDTH, expert_dim=32, num_experts=EXPERTS, router=router)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        hidden = self.embed(x)
        y, routing = self.moe(
            hidden
        )  # with padding: self.moe(hidden, padding_mask), True where there is no token
        return self.head(hidden + y), routing


def train(router: Router) -> tuple[Model, list[tuple[float, float]]]:
    """The model, and for each update its loss and its experts per token."""
    model, history = Model(router), []
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(UPDATES):
        x, target, _ = batch()
        guess, routing = model(x)
        loss = F.mse_loss(guess, target)
        history.append((loss.item(), routing.experts_per_token))
        optimizer.zero_grad()
        (loss + 0.01 * routing.load_balance_loss + 0.001 * routing.z_loss).backward()
        optimizer.step()
        step_budgets(model)
    return model, history


# %%
budget = 2.5  # what this task wants on average: 1 or 4
model, history = train(ThresholdRouter(WIDTH, EXPERTS, target_experts_per_token=budget))
for update in (1, 10, 50, 100, UPDATES):
    loss, experts = history[update - 1]
    print(f"update {update:3}: loss {loss:.3f}, {experts:.2f} experts per token")

# %% [markdown]
# ## Who takes many experts?
#
# In evaluation t stays, so a token's experts depend on the token alone. In half precision the router and its
# probabilities stay fp32.

# %%
x, target, wanted_T = batch(4096)
model.eval()
with torch.no_grad():
    guess, routing = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = F.mse_loss(model(x)[0].float(), target).item()
in_fp32 = F.mse_loss(guess, target).item()
taken_T = (routing.combine_weights() > 0).sum(dim=1)
easy, hard = (taken_T[wanted_T == wanted].float().mean().item() for wanted in (1, 4))
print(f"t {model.moe.router.to_log()['threshold']:.2f}: loss {in_fp32:.3f}, in bf16 {in_bf16:.3f}")
print(f"experts of an easy token {easy:.2f}, of a hard one {hard:.2f}; budget {budget}")

# %% [markdown]
# ## A router of your own
#
# It scores and counts as `Router` does, and chooses otherwise: the experts before the largest gap between a
# token's probabilities. Its name makes it a `--moe-router` of fairseq-train, too (docs/extending.md).


# %%
@register_router("largest_gap")
class LargestGapRouter(Router):
    description = "the experts before the largest gap between a token's probabilities"

    def choose(self, logits_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        sorted_TE, expert_TE = probs_TE.sort(dim=1, descending=True, stable=True)
        gap_T = (sorted_TE[:, :-1] - sorted_TE[:, 1:]).argmax(dim=1)
        return expert_TE, torch.arange(EXPERTS) <= gap_T.unsqueeze(1)


own_history = train(LargestGapRouter(WIDTH, EXPERTS))[1]
loss, experts = own_history[-1]
print(f"before the largest gap: loss {loss:.3f}, {experts:.2f} experts per token")

# %% [markdown]
# ## The picture

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
left.plot([experts for _, experts in history], label=f"budget {budget}")
left.plot([experts for _, experts in own_history], label="before the largest gap")
left.axhline(budget, color="grey", linewidth=0.8, linestyle=":")
left.set(xlabel="update", ylabel="experts per token", ylim=(0, None))
left.legend()
middle.bar(range(EXPERTS), (routing.rows_per_expert() / len(x)).tolist())
middle.set(xlabel="expert", ylabel="share of tokens that take it")
for wanted, label in ((1, "easy"), (4, "hard")):
    shares = [(taken_T[wanted_T == wanted] == taken).float().mean().item() for taken in range(1, 8)]
    right.bar([taken + (wanted - 2.5) / 7.5 for taken in range(1, 8)], shares, width=0.4, label=label)
right.set(xlabel="experts", ylabel="share of such tokens that take so many")
right.legend()
figure.savefig("training_loop.png", dpi=110)
