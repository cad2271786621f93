"""FSEFTTrainer: a spatial adapter with a size prior on a frozen backbone, Eq. (3) of FSEFT (arXiv 2303.17051)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from fsefs_nnunet.cases.preprocessed import hash_of, refuse_missing
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.cases.splits import SPLITS_FILE, load_splits, query_cases
from fsefs_nnunet.features.bank import Request
from fsefs_nnunet.features.layout import Layout, pooled_name, query_layout, whole_name
from fsefs_nnunet.inference.trained_model import PRIOR_KEY
from fsefs_nnunet.labels import foreground_classes, foreground_names
from fsefs_nnunet.methods.registry import METHODS
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.priors import prior_named
from fsefs_nnunet.priors.prior import SupportLabels
from fsefs_nnunet.priors.query_volumes import QueryVolumes, calibration_cases, share_found
from fsefs_nnunet.trainers.bank_trainer import BankTrainer
from fsefs_nnunet.trainers.kshot_trainer import validates

BANK_SHARE = 0.2  # of a time limit: once it is used, queries without stored features are left out
CALIBRATION_VOXELS, MOST_CALIBRATION_BATCHES = 2**17, 8  # of crops of the support, and of pooled support cases


class FSEFTTrainer(BankTrainer):
    """Trains on the support under a prior on the queries: L_SEG(support) + lambda * L_TI(query).

    Methods without a prior in their training derive from it as well: `fseft predict` needs their prior.
    """

    method = METHODS["fseft"]

    @property
    def wants_prior(self) -> bool:
        return bool(self.method.trains_with_prior and self.settings.lambda_)

    @property
    def classes(self) -> list[int | tuple[int, ...]]:
        return foreground_classes(self.label_manager)

    @property
    def class_names(self) -> list[str]:
        return foreground_names(self.dataset_json["labels"], self.label_manager.has_regions)

    # ---- before training ----

    def describe_run(self) -> RunFile:
        run = super().describe_run()
        splits = load_splits(Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE)
        # the labelled queries enter as images; their labels are not read
        run.queries = [*run.labelled_queries, *query_cases(splits, self.fold)[1]]
        return run

    @property
    def unlabelled_queries(self) -> list[str]:
        return [case for case in self.run.queries if case not in self.run.labelled_queries]

    def prepare_training(self) -> None:
        run = self.run
        self.unlabelled = UnlabelledQueries(self.preprocessed_dataset_folder)
        if self.wants_prior:
            missing = set(self.unlabelled_queries) - set(self.unlabelled.cases)
            refuse_missing(missing, self.unlabelled.folder, " --queries FOLDER")
        self.print_to_log_file(
            f"{len(run.support)} labelled support cases (all the labels that this training uses): {run.support}; "
            f"{len(run.queries)} queries, {len(run.labelled_queries)} of them with labels for the final validation."
        )
        super().prepare_training()

    def fill_bank(self) -> None:
        support = {case: self.segmentations[case] for case in self.run.support}
        spacing, ignored = self.configuration_manager.spacing, self.label_manager.ignore_label
        self.support_labels = SupportLabels(support, self.classes, spacing, ignored)
        self.pooled_support = {}
        if max(self.settings.pool) > 1:  # even without a prior, so that a later training with one needs no second pass
            largest = max(self.pooled(case).voxels for case in self.run.support)
            sizes, most = self.support_labels.sizes_ml, max(CALIBRATION_VOXELS // largest, 1)
            cases = calibration_cases(sizes, len(self.classes), most)
            self.pooled_support = {pooled_name(case): case for case in cases}
        super().fill_bank()
        if self.wants_prior:
            self.drop_missing_queries()
        self.estimate_prior()

    def leaves_out(self, case: str) -> bool:
        budget, of_queries = self.budget_seconds(), {name for q in self.run.queries for name in (q, whole_name(q))}
        return budget is not None and case in of_queries and self.used_seconds() >= BANK_SHARE * budget

    def drop_missing_queries(self) -> None:
        """Features of many large queries could take most of a time limit; a few queries are enough for the prior."""
        left_out = [case for case in self.run.queries if case not in self.bank]
        self.run.queries = [case for case in self.run.queries if case in self.bank]
        if left_out:
            self.print_to_log_file(
                f"The prior looks at {len(self.run.queries)} queries and does without {len(left_out)}, since a fifth "
                f"of the time was used before their features were computed: {', '.join(left_out)}."
            )

    def requests(self) -> list[Request]:
        pooled = [self.request(case, self.pooled(case), name) for name, case in self.pooled_support.items()]
        requests = [*super().requests(), *pooled]
        if self.wants_prior:
            requests += [self.request(case, self.pooled(case)) for case in self.run.labelled_queries]
            requests += [self.unlabelled_request(case) for case in self.unlabelled_queries]
            # the prior and the final validation share a pass of the backbone
            requests += self.whole_queries(requests) if validates() else []
        return requests

    def unlabelled_request(self, case: str) -> Request:
        image = partial(self.unlabelled.load, case)
        layout = query_layout(self.unlabelled.shape_of(case), self.settings.pool)
        return Request(case, [self.unlabelled.file(case)], lambda: hash_of(image()), image, layout)

    def pooled(self, case: str) -> Layout:
        return query_layout(self.shape_of(case), self.settings.pool)

    def estimate_prior(self) -> None:
        """Estimate it from the support labels alone."""
        self.prior = prior_named(self.method.prior).estimate(self.support_labels)
        self.query_volumes, self.penalised = None, set()  # queries whose last penalty was above zero
        names, gamma = self.class_names, self.settings.gamma
        for line in self.prior.describe(names, gamma) if self.wants_prior and self.run.queries else []:
            self.print_to_log_file(line)
        if why := self.why_no_prior():
            self.print_to_log_file(f"The prior has no effect: {why}.")
            return
        self.run.prior = self.prior.report(names, gamma)
        voxel_ml = float(np.prod(self.configuration_manager.spacing)) / 1000
        pooled_support = {
            name: torch.tensor(self.support_labels.sizes_ml[case], dtype=torch.float32)
            for name, case in self.pooled_support.items()
        }
        self.query_volumes = QueryVolumes(self.bank, self.run.queries, voxel_ml, pooled_support)

    def why_no_prior(self) -> str | None:
        if not self.wants_prior:
            return "it is switched off"
        if not self.run.queries:
            return "there are no queries"
        return self.prior.why_no_effect()

    def on_train_start(self):
        super().on_train_start()
        self.log_query_sizes("before")
        self.stop_at_plateau()

    # ---- training ----

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # query, sizes and penalty of the epoch's steps
        # not during the warm-up, which a time limit shortens
        warm = self.progress() >= self.settings.prior_from_epoch / self.num_epochs
        self.prior_counts = warm and self.query_volumes is not None
        if self.prior_counts:
            self.calibrate()

    @torch.no_grad()
    def calibrate(self) -> None:
        """Measure on the support how much pooling reduces predicted sizes."""
        if not self.pooled_support:
            return
        self.dataloader_val.start_epoch(0)  # the same crops each time
        of_batch = self.settings.crops_per_step * int(np.prod(self.dataloader_val.crop_size))
        number = min(max(CALIBRATION_VOXELS // of_batch, 1), MOST_CALIBRATION_BATCHES)
        batches = (next(self.dataloader_val) for _ in range(number))
        found = share_found(self.network, batches, self.label_manager)
        self.dataloader_val.start_epoch(0)
        self.query_volumes.calibrate(self.network, self.label_manager.has_regions, found)

    def penalty(self) -> torch.Tensor | None:
        """L_TI of the step's query; None if there is none or, on a CPU, if it is zero."""
        steps, step = self.num_iterations_per_epoch, self.dataloader_train.step - 1
        visit = self.query_volumes.visit(self.current_epoch, step, steps) if self.prior_counts else None
        if visit is None:
            return None
        has_regions = self.label_manager.has_regions
        query = self.query_volumes.rotating(visit, self.settings.seed)
        # most sizes are as expected and give no gradient; on a GPU, the comparison would wait for the kernels
        if self.device.type == "cpu" and query not in self.penalised:
            with torch.no_grad():
                prediction = self.query_volumes.predict(self.network, query, has_regions)
                penalty = self.prior.penalty(prediction, self.settings.gamma)
            if penalty == 0:
                self.seen.append((query, prediction.sizes.soft, penalty))
                return None
        prediction = self.query_volumes.predict_beside_support(self.network, query, visit, has_regions)
        penalty = self.prior.penalty(prediction, self.settings.gamma)
        if self.device.type == "cpu":
            (self.penalised.add if penalty > 0 else self.penalised.discard)(query)
        self.seen.append((query, prediction.sizes.soft.detach(), penalty.detach()))
        return penalty * (steps / self.query_volumes.visits(steps))

    def describe_epoch(self, epoch: int) -> dict:
        described = super().describe_epoch(epoch)
        if self.seen:
            described["penalty"] = torch.stack([penalty for _, _, penalty in self.seen]).mean().item()
            sizes = torch.stack([sizes for _, sizes, _ in self.seen]).cpu()
            described["sizes_ml"] = {query: self.by_class(of) for (query, *_), of in zip(self.seen, sizes)}
        return described

    def by_class(self, sizes: torch.Tensor) -> dict[str, float]:
        return {name: round(size, 4) for name, size in zip(self.class_names, sizes.tolist())}

    def on_train_end(self):
        self.log_query_sizes("after")
        super().on_train_end()

    @torch.no_grad()
    def log_query_sizes(self, when: str) -> None:
        """when: "before" or "after" the training."""
        if self.query_volumes is None or (when == "before" and self.current_epoch):
            return
        self.calibrate()
        self.print_to_log_file(f"Predicted sizes of the queries in ml {when} this training:")
        sizes_ml, remarks = self.run.sizes_ml.setdefault(when, {}), []
        for query in self.run.queries:
            sizes = self.query_volumes.predict(self.network, query, self.label_manager.has_regions).sizes
            sizes_ml[query] = self.by_class(sizes.soft)
            line = ", ".join(f"{name} {size:.2f}" for name, size in sizes_ml[query].items())
            self.print_to_log_file(f"  {query}: {line}", add_timestamp=False)
            for name, reasons in self.prior.remarks(sizes, self.class_names).items():
                remarks.append(f"{name} of {query} {' and '.join(reasons)}: the prior does not enlarge it.")
        # what an untrained network misses says nothing about a query
        for remark in remarks if self.current_epoch else []:
            self.print_to_log_file(remark)

    def added_to_checkpoint(self) -> dict:
        """What `fseft predict` needs of a model without its dataset."""
        return super().added_to_checkpoint() | {PRIOR_KEY: {"name": self.method.prior, "state": self.prior.state()}}
