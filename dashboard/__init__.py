"""The operator's web page: reads through ``aurora_sgl.store``, acts through ``aurora_sgl.rollout``.

``server`` starts it, ``shell`` is what every page has around it, ``screens`` has one file a page.
"""
