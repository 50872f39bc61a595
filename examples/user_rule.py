"""A rule that no library has: Lion's momentum with a soft sign, in ten lines, trained.

    python examples/user_rule.py

The soft sign u / (|u| + softness) is Lion's sign for large u and proportional to u for small ones.
"""

import torch

import forge_train

# --8<-- [start:rule]
CUDA = """
    float u = beta1 * m + (1.0f - beta1) * g;
    w = w * (1.0f - lr * weight_decay) - lr * quotient(u, fabsf(u) + softness);
    m = beta2 * m + (1.0f - beta2) * g;
"""


def soft_lion(g, w, m, *, lr, weight_decay, beta1, beta2, softness, step):
    """The same on the CPU, for a tile."""
    u = m.mul(beta1).add_(g * (1 - beta1))
    w.mul_(1 - lr * weight_decay).sub_(lr * (u / (u.abs() + softness)))
    m.mul_(beta2).add_(g * (1 - beta2))


RULE = forge_train.UserRule(
    "soft_lion", states=["m"], cuda=CUDA, cpu=soft_lion,
    lr=3e-3, weight_decay=0.01, beta1=0.9, beta2=0.99, softness=1e-4,
)  # fmt: skip
# --8<-- [end:rule]


def main() -> None:
    """Fit a small network to a random one."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, student = (
        torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 32)).to(
            device
        )
        for _ in range(2)
    )
    fused = forge_train.fuse(student, RULE, max_norm=1.0)
    print(fused)
    for step in range(1, 201):
        x = torch.randn(128, 64, device=device)
        loss = torch.nn.functional.mse_loss(student(x), teacher(x).detach())
        loss.backward()
        fused.optimizer.step()
        fused.optimizer.zero_grad()
        if step in (1, 10, 50, 100, 200):
            print(f"step {step:3d}  loss {loss.item():.5f}")


if __name__ == "__main__":
    main()
