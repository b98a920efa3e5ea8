"""Hugging Face Trainer: alpha * CE + (1 - alpha) * KD of a causal language model, in one call.

What the Trainer's words mean here:

- ``num_items_in_batch`` (tokens with a label in all micro-batches of a step) is ``denominator``. So gradient
  accumulation gives the gradient of the whole batch, however unequal the micro-batches are. It is None where the
  Trainer did not count (evaluation, models that take no loss arguments): ``denominator=None`` is the mean over the
  tokens of this batch.
- ``batchmean`` of ``F.kl_div`` over the selected tokens, ``(tokens, V)``, is our ``"mean"`` with ``class_dim=-1``.
- A model's logits at position i predict token i + 1. Models shift the logits; shift the *labels* instead: the
  backward of ``logits[:, :-1]`` allocates and fills a second matrix of the logits' size.
- ``-100`` (prompt, padding) is ``ignore_index``'s default: such tokens count nowhere.

Compared below: the loss with the model's own cross entropy and ``F.kl_div``; a step with 4 x 2 sequences accumulated
with a step with 8; both with plain PyTorch. Tiny random Llamas; nothing is downloaded.

    python examples/recipes/huggingface_trainer.py
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import check
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import kdkernels

ALPHA, TEMPERATURE = 0.3, 2.0
VOCABULARY, LENGTH, SEQUENCES = 320, 24, 8


class DistillationTrainer(Trainer):
    """A Trainer whose loss is ``alpha`` * CE + (1 - ``alpha``) * KD to the ``teacher``."""

    def __init__(self, *args: Any, teacher: nn.Module, alpha: float, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True).eval()
        self.alpha, self.temperature = alpha, temperature

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: the sum over its tokens / ``num_items_in_batch``."""
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**model_inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**model_inputs).logits
        loss = kdkernels.kd_loss(
            outputs.logits,
            teacher_logits,
            self.temperature,
            target=F.pad(inputs["labels"][:, 1:], (0, 1), value=-100),
            ce_weight=self.alpha,
            weight=1 - self.alpha,
            class_dim=-1,
            denominator=num_items_in_batch,
        )
        # DistributedDataParallel averages over processes what num_items_in_batch has divided by the tokens of all.
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def formula(student: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor], count: int | None = None) -> Tensor:
    """The same with the model's own cross entropy, and shifted logits. ``count`` replaces the number of tokens."""
    outputs = student(**inputs) if count is None else student(**inputs, num_items_in_batch=count)
    with torch.no_grad():
        teacher_logits = teacher(input_ids=inputs["input_ids"]).logits
    selected = inputs["labels"][:, 1:] != -100
    logs = F.log_softmax(outputs.logits[:, :-1][selected] / TEMPERATURE, -1)
    soft = F.softmax(teacher_logits[:, :-1][selected] / TEMPERATURE, -1)
    kd = F.kl_div(logs, soft, reduction="sum") / (selected.sum() if count is None else count) * TEMPERATURE**2
    return ALPHA * outputs.loss + (1 - ALPHA) * kd


def llama(width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    # Large initial weights: with the default ones, the distributions of a random model are nearly uniform.
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes))


def sequences() -> list[dict[str, Tensor]]:
    """Random tokens; the first few of each sequence are a prompt, without labels: few or many."""
    torch.manual_seed(0)
    examples = []
    for i in range(SEQUENCES):
        ids = torch.randint(VOCABULARY, (LENGTH,))
        labels = ids.clone()
        labels[: 2 + (5 * i) % (LENGTH - 3)] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


class KeepGradients(TrainerCallback):
    """Keeps the gradients that the optimizer sees."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients = check.gradients(model)


def step(micro_batch: int) -> tuple[Tensor, Tensor, float]:
    """One optimizer step over all sequences: gradients, weights after it, the loss that the Trainer logs."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=SEQUENCES // micro_batch,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        keep, student = KeepGradients(), llama(32, seed=1)
        trainer = DistillationTrainer(
            student,
            arguments,
            train_dataset=sequences(),
            callbacks=[keep],
            teacher=llama(48, seed=2),
            alpha=ALPHA,
            temperature=TEMPERATURE,
        )
        logged = trainer.train().training_loss
    return keep.gradients, check.parameters(student), logged


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    batch = {name: torch.stack([example[name] for example in sequences()]) for name in ("input_ids", "labels")}
    student, teacher = llama(32, seed=1).double(), llama(48, seed=2).double()
    expected = formula(student, teacher, batch)
    expected.backward()
    expected_gradients = check.gradients(student)
    count = int((batch["labels"][:, 1:] != -100).sum())
    counted = formula(student, teacher, batch, count)
    check.same("the formula with num_items_in_batch and with its own mean", counted, expected)

    whole_gradients, whole_weights, whole_loss = step(SEQUENCES)
    check.same("the Trainer's loss, 8 sequences, and the formula", whole_loss, expected)
    check.same("its gradients and the formula's", whole_gradients, expected_gradients)
    gradients, weights, loss = step(2)
    check.same("the Trainer's loss, 4 x 2 sequences accumulated, and the formula", loss, expected)
    check.same("its gradients and the formula's", gradients, expected_gradients)
    check.same("weights after the accumulated step and after the whole one", weights, whole_weights)


if __name__ == "__main__":
    main()
