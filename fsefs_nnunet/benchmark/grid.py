"""What `fseft benchmark` runs: the cells that are not done yet, and the outputs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from fsefs_nnunet.benchmark.cells import Cell, Spent
from fsefs_nnunet.benchmark.outputs import write_results
from fsefs_nnunet.benchmark.report import write_report
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.shared_features import share_features
from fsefs_nnunet.benchmark.study import Study
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.evaluation.tables import duration
from fsefs_nnunet.methods.registry import METHODS, choose


def plan_cells(study: Study, shots: list[int | str], num_folds: int, methods: list[str]) -> list[Cell]:
    """The grid: shots first, then folds, then methods; before all of them zero-shot, which has neither shots nor folds.

    Zero-shot is included whenever the backbone's own head knows a label, whether chosen or not.

    Args:
        shots: default: those of the plans.
        num_folds: this many of the splits, from 0.
        methods: names of METHODS; default: all.

    Raises:
        InputError: for a cell that the plans or splits do not have, or if one of other plans is in its place.
    """
    chosen = choose(methods)
    if num_folds < 1:
        raise InputError(f"{num_folds} folds: give at least 1.")
    cells = []
    if study.known_labels():
        cells.append(Cell(study, "zero_shot", 0, 0))
    else:
        print("No zero-shot row: the backbone's own head knows no label of the dataset.")
    for k in dict.fromkeys(shots or study.planned_shots):
        for fold in range(num_folds):
            others = [Cell(study, m, k, fold) for m in chosen if METHODS[m].trainer and not METHODS[m].suffix]
            cells += [*others, *(Cell(study, m, k, fold, tuple(others)) for m in chosen if METHODS[m].suffix)]
    for cell in cells:
        cell.check()
    if not cells:
        raise InputError("There is nothing to run: choose other --methods.")
    return cells


def run_cells(study: Study, cells: list[Cell], command: list[str]) -> None:
    """Fill the grid; results.csv, table.md, figure.png and report.html go to the experiment's folder.

    command: what was typed, for the report.

    Raises:
        InputError: at the end, if cells failed; or when interrupted.
    """
    output = study.experiment.work
    results = {cell: result for cell in cells if (result := cell.finished())}
    print(f"{study.setting} {len(cells)} cells, {len(results)} of them already done.", flush=True)
    try:
        sharing = [cell for cell in cells if cell not in results and cell.method.shares_features]
        failures, spent = share_features(sharing)
        for number, cell in enumerate(cells, 1):
            if cell in failures:
                continue
            try:
                cell.check_budget()
                if cell in results:
                    continue
                print(f"[{number}/{len(cells)}] {cell.title}{_left(cells, results, failures, spent)}", flush=True)
                results[cell] = cell.run(spent.get(cell, Spent()))
            except Exception as error:  # libraries may raise anything; the other cells continue
                results.pop(cell, None)
                failures[cell] = str(error)
                print(f"This one failed, the others continue: {error}", flush=True)
                continue
            write_results([results[c] for c in cells if c in results], output, study.setting)
        if results:
            ordered = {cell: results[cell] for cell in cells if cell in results}
            write_results(list(ordered.values()), output, study.setting)
            write_report(study, ordered, failures, command)
            text = (output / "table.md").read_text("utf-8")
            print(f"\n{text}\n{output}: report.html, table.md, results.csv, figure.png.")
    except KeyboardInterrupt:
        raise InputError("Interrupted. Run the same command again to continue; completed cells are skipped.") from None
    if failures:
        raise InputError(
            f"{len(failures)} of {len(cells)} cells failed: {'; '.join(cell.title for cell in failures)}. "
            f"{Path(output) / 'log.txt'} says why; the same command tries them again."
        )


def _left(cells: list[Cell], results: dict[Cell, Result], failures: dict[Cell, str], spent: dict[Cell, Spent]) -> str:
    """Estimate of the time left: each cell takes as long as those of its method, or else as all others.

    spent: what cells took already.
    """
    if not results:
        return ""
    every = [result.wall_seconds for result in results.values()]
    seconds = 0.0
    for cell in cells:
        if cell not in results and cell not in failures:
            same = [result.wall_seconds for result in results.values() if result.method == cell.name]
            seconds += max(0.0, mean(same or every) - spent.get(cell, Spent()).seconds)
    return f"; about {duration(seconds)} left"
