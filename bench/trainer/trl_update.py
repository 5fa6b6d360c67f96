"""The policy update of TRL's GRPOTrainer on the responses of `training_phase.Update`, for a comparison.

The responses are given to the trainer's own loss as its generation would leave them: padded to the longest of the step,
split into equal micro-batches, no reference model (beta 0), log-probabilities of before taken from the same forward.
What is timed is that loss, its backward and the same AdamW. Its micro-batch size is a setting, so several are tried;
`use_liger_kernel` needs a GPU.
"""

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor

from bench.training_phase import Update

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)


class TrlUpdate:
    """A copy of an update's policy inside a GRPOTrainer.

    Args:
        update: Whose policy, which is on a CPU, and responses are taken.
        micro_batch_size: Responses at once.
    """

    def __init__(self, update: Update, micro_batch_size: int) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        from bench.job_folder import make_tokenizer

        experience, S = update.experience, update.experience.responses
        with tempfile.TemporaryDirectory() as folder:
            self._trainer = GRPOTrainer(
                copy.deepcopy(update.model),
                [lambda completions, **_: [0.0] * len(completions)],
                GRPOConfig(
                    output_dir=folder,
                    num_generations=4,
                    per_device_train_batch_size=micro_batch_size,
                    gradient_accumulation_steps=S // micro_batch_size,
                    loss_type="grpo",
                    beta=0.0,
                    gradient_checkpointing=False,
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                    use_cpu=True,
                    bf16=False,
                ),
                train_dataset=Dataset.from_dict({"prompt": ["w0"] * S}),
                processing_class=make_tokenizer(update.model.config.vocab_size),
            )
        self._trainer.current_gradient_accumulation_steps = S // micro_batch_size  # train() sets it
        self.model = self._trainer.model
        self.model.train()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        starts = experience.cu_seqlens.tolist()[:-1]
        # GRPO has one advantage a response.
        advantages = experience.reward_advantages[starts]
        (padded,) = update.padded[S]
        columns = padded.response_mask.shape[1]
        whole = {
            "prompt_ids": padded.input_ids[:, :-columns],
            "prompt_mask": padded.attention_mask[:, :-columns],
            "completion_ids": padded.input_ids[:, -columns:],
            "completion_mask": padded.attention_mask[:, -columns:],
            "advantages": advantages,
        }
        self._micro_batches: list[dict[str, Any]] = [
            {name: values[start : start + micro_batch_size] for name, values in whole.items()}
            for start in range(0, S, micro_batch_size)
        ]

    def backward(self) -> Tensor:
        """Forward and backward of all micro-batches; the loss."""
        total = torch.zeros(())
        for inputs in self._micro_batches:
            loss = self._trainer.compute_loss(self.model, inputs)
            loss.backward()
            total += loss.detach()
        return total

    def step(self) -> None:
        """Forward, backward and the optimizer's step."""
        self._optimizer.zero_grad(set_to_none=False)
        self.backward()
        self._optimizer.step()
