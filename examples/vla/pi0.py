"""transformers' pi0 as a policy for the same samples: an action is denoised from noise by flow matching.

    images      ──► SigLIP ─► patches ─┐
    instruction ──────────────► words ─┴► Gemma ──keys and values of every layer──┐
    noise, previous action ───────────────────────► Gemma, the action expert ─────┴─► velocity: noise - action

An action is one-hot. It is learnt by flow matching (Black et al., "pi0", 2024), noise and its share drawn anew every
time, and answered in one step from the mean of the noise. The policy has no memory but for its last action. Knows
nothing of shardwise.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PI0Config, PI0ForConditionalGeneration

__all__ = ["Pi0Policy"]


class Pi0Policy(nn.Module):
    """images uint8 (batch, steps, channels, side, side), instruction (batch, words), previous actions and wanted ones
    (batch, steps), -100 where none is wanted -> the loss, and logits (batch, steps, actions)."""

    def __init__(
        self,
        *,
        num_actions: int,
        vocabulary_size: int,
        num_channels: int = 3,
        image_size: int = 28,
        patch: int = 4,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.num_actions, self.image_token = num_actions, vocabulary_size  # a token behind the words
        self.num_patches = (image_size // patch) ** 2
        sizes = {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
        }
        gemma = {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": width // heads, **sizes}
        config = PI0Config(
            vlm_config={
                "model_type": "paligemma",
                "text_config": {**gemma, "vocab_size": vocabulary_size + 1, "pad_token_id": 0},
                "vision_config": {
                    "model_type": "siglip_vision_model",
                    "vision_use_head": False,
                    "num_channels": num_channels,
                    "image_size": image_size,
                    "patch_size": patch,
                    **sizes,
                },
                "projection_dim": width,
                "image_token_id": self.image_token,
            },
            dit_config=gemma,
            chunk_size=1,
            max_state_dim=num_actions + 1,
            max_action_dim=num_actions,
        )
        self.pi0 = PI0ForConditionalGeneration(config)

    def forward(
        self,
        images: torch.Tensor,
        instruction: torch.Tensor,
        previous: torch.Tensor,
        target_actions: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        batch, steps = previous.shape
        rows = batch * steps  # every step is a sample of its own
        words = instruction.repeat_interleave(steps, 0)  # (rows, words)
        patches = words.new_full((rows, self.num_patches), self.image_token)
        actions = F.one_hot(target_actions.clamp(min=0), self.num_actions).float()  # (batch, steps, actions)
        if self.training:
            noise, time = torch.randn_like(actions), torch.rand(batch, steps, device=images.device)
        else:
            noise, time = torch.zeros_like(actions), torch.ones(batch, steps, device=images.device)
        answer = self.pi0(
            state=F.one_hot(previous, self.num_actions + 1).float().flatten(0, 1),
            noise=noise.view(rows, 1, -1),
            timestep=time.flatten(),
            input_ids=torch.cat([patches, words], dim=1),
            attention_mask=torch.cat([torch.ones_like(patches), (words != 0).long()], dim=1),
            pixel_values=(images.float() / 127.5 - 1).flatten(0, 1)[:, None],  # (rows, cameras, channels, side, side)
            pixel_attention_mask=torch.ones(rows, 1, dtype=torch.bool, device=images.device),
            actions=actions.view(rows, 1, -1),  # mixed with the noise
        )
        logits = noise - answer.logits.view(batch, steps, -1)  # the action, if the velocity is right
        errors = (logits - actions).square().mean(-1)  # (batch, steps): those of the velocity, noise - actions
        counted = target_actions != -100
        return {"loss": (errors * counted).sum() / counted.sum().clamp(min=1), "logits": logits}
