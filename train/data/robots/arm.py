"""A planar arm of two links with a gripper, and an expert that reaches and grasps."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Arm", "ArmState"]

LINK = 0.5  # length of each of the two links; the arm reaches 1
SECONDS = 0.05  # of a step
SPEED = 2.0  # of a joint at full command, radians a second
LAG = 0.5  # share of the way to the commanded speed in a step
CLOSING = 0.25  # share of its way that the gripper moves in a step
TOLERANCE = 0.05  # between the tip and the target when the gripper closes
WAY = 0.1  # at which the observed way to the target is half of its largest
GAIN = 4.0  # of the expert: speed per radian of error, per second
NEAR = 0.025  # where the expert closes the gripper: half the tolerance


class ArmState(NamedTuple):
    """angles, speeds: (B, 2) of the joints. grip: (B,), 0 open, 1 closed. target: (B, 2). held: (B,) bool."""

    angles: Tensor
    speeds: Tensor
    grip: Tensor
    target: Tensor
    held: Tensor


class Arm:
    """Reach a target with the tip, and close the gripper there.

    An action is the speeds of both joints, in [-1, 1] of the greatest, and the command of the gripper, which closes
    above 0.5. The target is held if the gripper passes its middle while the tip is nearer than 0.05; the reach is 1.
    A gripper that closed elsewhere must be opened again first.

    An observation is what the upper arm sees, whatever its own direction: cosine and sine of the elbow, the speeds, the
    gripper, the target, and the way from the tip to it, v / (|v| + 0.1), which is finest where it is short.
    """

    observation_size, action_size, horizon = 9, 3, 80
    grippers: tuple[int, ...] = (2,)

    def begin(self, numbers: np.ndarray) -> ArmState:
        """Arms at rest, and targets between 0.3 and 0.9 from the base, both in front; (B, 8) numbers in (0, 1)."""
        u = torch.from_numpy(numbers).float()
        side = torch.where(u[:, 2] < 0.5, -1.0, 1.0)
        angles = torch.stack([torch.pi * (u[:, 0] - 0.5), side * (0.4 + 2.2 * u[:, 1])], 1)
        distance, direction = 0.3 + 0.6 * u[:, 3], torch.pi * (u[:, 4] - 0.5)
        target = distance[:, None] * torch.stack([direction.cos(), direction.sin()], 1)
        still = torch.zeros_like(angles)
        return ArmState(angles, still, still[:, 0].clone(), target, torch.zeros(len(u), dtype=torch.bool))

    def tip(self, state: ArmState) -> Tensor:
        """Where the gripper is, (B, 2)."""
        return self.place(state)[:, 2]

    def place(self, state: ArmState) -> Tensor:
        """Base, elbow, tip and target, (B, 4, 2)."""
        headings = state.angles.cumsum(1)
        links = LINK * torch.stack([headings.cos(), headings.sin()], -1)  # (B, 2 links, 2)
        joints = torch.cat([torch.zeros_like(links[:, :1]), links.cumsum(1)], 1)
        return torch.cat([joints, state.target[:, None]], 1)

    def observe(self, state: ArmState) -> Tensor:
        """What the upper arms see, (B, 9) float32."""
        shoulder, elbow = state.angles.unbind(1)
        ahead = torch.stack([shoulder.cos(), shoulder.sin()], 1)
        frame = torch.stack([ahead, torch.stack([-ahead[:, 1], ahead[:, 0]], 1)], 1)  # (B, 2 axes, 2)
        target, way = ((frame @ each[..., None])[..., 0] for each in (state.target, state.target - self.tip(state)))
        way = way / (way.norm(dim=1, keepdim=True) + WAY)
        parts = [elbow.cos()[:, None], elbow.sin()[:, None], state.speeds / SPEED, state.grip[:, None], target, way]
        return torch.cat(parts, 1)

    def step(self, state: ArmState, actions: Tensor) -> ArmState:
        """Speeds go part of the way to the command, and the gripper opens or closes a bit."""
        command = actions[:, :2].float().clamp(-1, 1) * SPEED
        speeds = state.speeds + LAG * (command - state.speeds)
        angles = state.angles + SECONDS * speeds
        grip = (state.grip + torch.where(actions[:, 2] > 0.5, CLOSING, -CLOSING)).clamp(0, 1)
        moved = ArmState(angles, speeds, grip, state.target, state.held)
        passed = (state.grip <= 0.5) & (grip > 0.5)
        near = (self.tip(moved) - state.target).norm(dim=1) < TOLERANCE
        return moved._replace(held=state.held | (passed & near))

    def expert(self, state: ArmState) -> Tensor:
        """Go to the angles that put the tip on the target, without turning the elbow over; close when there."""
        x, y = state.target.unbind(1)
        cosine = ((x * x + y * y - 2 * LINK * LINK) / (2 * LINK * LINK)).clamp(-1, 1)
        elbow = torch.acos(cosine) * torch.where(state.angles[:, 1] < 0, -1.0, 1.0)
        shoulder = torch.atan2(y, x) - torch.atan2(LINK * elbow.sin(), LINK + LINK * elbow.cos())
        error = torch.stack([shoulder, elbow], 1) - state.angles
        error = torch.stack([torch.atan2(error[:, 0].sin(), error[:, 0].cos()), error[:, 1]], 1)  # the short way round
        speeds = (GAIN / SPEED * error).clamp(-1, 1)
        near = ((self.tip(state) - state.target).norm(dim=1) < NEAR) | state.held
        return torch.cat([speeds, near.float()[:, None]], 1)

    def succeeded(self, state: ArmState) -> Tensor:
        """Which targets are held, (B,) bool."""
        return state.held
