"""DeepSpeed's launcher of this host's ranks: ``python -m pretrain.engine.local_ranks --world_info=... --module NAME ...``.

It is ``deepspeed.launcher.launch``, which the ``deepspeed`` command starts on every host, without the import of MLflow.
"""

from __future__ import annotations

from pretrain.engine.importing import import_deepspeed

if __name__ == "__main__":
    import_deepspeed()
    from deepspeed.launcher.launch import main

    main()
