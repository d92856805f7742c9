"""Bring Prefect and MLflow to one truth where a training died, and take the training up again."""

from prefect import flow

from flows import command_line
from tasks.reconciliation import end_left_runs, take_up_crashed_runs
from tasks.services import check_services


@flow(name="reconcile-runs")
def reconcile_runs() -> None:
    """End the runs that were left open by a process that died; schedule crashed trainings again."""
    check_services()
    end_left_runs()
    take_up_crashed_runs()


if __name__ == "__main__":
    command_line.run(reconcile_runs)
