"""When to train, and what becomes of the result: triggers, one leader, one run at a time.

``loop.Scheduler`` is the policy carried out once a second; ``service.run`` is the process around
it. Everything it knows is in the store, so that the next holder of the lease goes on where the
last one stopped, and ``rollout.status.scheduler`` says what it does, what comes next, and why.
"""
