"""The loop: next batch, step, log, evaluate, save, stop."""

from megacpt.train.job import Job


def train(job: Job) -> None:
    """Train from where the job stands to the end of its plan."""
    plan = job.plan
    job.finish_export()
    if plan.resume is None:
        _evaluate(job, 0)
    for iteration in range(plan.first_iteration + 1, plan.last_iteration + 1):
        lr = plan.learning_rate(iteration)
        grad_norm = job.step(job.next_batch(), lr)
        job.log_step(lr, grad_norm)
        _evaluate(job, iteration)
        if plan.saves_after(iteration):
            job.save()


def _evaluate(job: Job, iteration: int) -> None:
    if job.plan.evaluates_after(iteration):
        job.evaluate()
    if job.plan.runs_tasks_after(iteration):
        job.run_tasks()
