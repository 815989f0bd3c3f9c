"""The loop: next batch, step, log, evaluate, save, stop."""

from megacpt.train.job import Job


def train(job: Job) -> None:
    """Train from where the job stands to the end of its plan, or until the guard ends it."""
    plan = job.plan
    job.finish_export()
    if plan.resume is None:
        job.evaluate()
    for iteration in range(plan.first_iteration + 1, plan.last_iteration + 1):
        lr, batches = plan.learning_rate(iteration), job.next_batch()
        job.probe(batches)
        grad_norm = job.step(batches, lr)
        job.log_step(lr, grad_norm)
        job.measure()
        verdict = job.evaluate()
        if verdict.ends_on is not None:
            return job.end(verdict)
        if plan.saves_after(iteration) or verdict.saves:
            job.save()
