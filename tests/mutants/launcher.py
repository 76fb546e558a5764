# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Faults of the launchers and of command lines."""

from __future__ import annotations

from tests.mutants import faults

FAULTS = [
    *faults("scripts/visual_opsd/launch.sh", "test_launchers.py test_clusters.py", [
        ("-1 among the devices counts", "[[ $device == -* ]] && break", "[[ $device == -* ]] || :"),
        ("variables that differ are not compared",
         'fail "$FOUND_NAME=$FOUND contradicts $name=${!name}; unset what is left over."', ":"),
        ("jobs share a port", "20000 + SLURM_JOB_ID % 10000", "20000"),
        ("nodes count from 1", 'check_number "$FOUND_NAME" "$rank" 0 $((nodes - 1))',
         'check_number "$FOUND_NAME" "$rank" 1 $nodes'),
        ("the flags are lost", '${condition[@]+"${condition[@]}"} ${FLAGS[@]+"${FLAGS[@]}"}',
         '${condition[@]+"${condition[@]}"}'),
        ("the condition is lost", '${condition[@]+"${condition[@]}"} ${FLAGS[@]+"${FLAGS[@]}"}',
         '${FLAGS[@]+"${FLAGS[@]}"}'),
        ("beta and temperature are exchanged",
         "add_positional model_path teacher_mode jsd_beta jsd_temperature",
         "add_positional model_path teacher_mode jsd_temperature jsd_beta"),
        ("the temperature of sampling is that of the loss", "SAMPLE_TEMP=sample_temperature",
         "SAMPLE_TEMP=jsd_temperature"),
        ("a stopped run has torchrun's 30 s",
         "${SHUTDOWN_TIMEOUT:-${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}}", "30"),
        ("the shell stays between", '    exec "${command[@]}"\n', '    "${command[@]}"\n'),
        ("the first host is the last", "head -n 1)\n        [[ -n $address ]]",
         "tail -n 1)\n        [[ -n $address ]]"),
    ]),
    *faults("scripts/visual_opsd/run_visual_opsd_noise.sh", "test_launchers.py", [
        ("the control is not the control", "--noise_vt True", "--noise_vt False"),
    ]),
    *faults("scripts/visual_opsd/run_visual_opsd_control.sh", "test_launchers.py", [
        ("every control is the same", '--vt "$1" ::', "--vt other ::"),
        ("the kind is taken for the model", '"${@:2}"', '"$@"'),
    ]),
    *faults("scripts/visual_opsd/cli.py",
            "visual_opsd/test_settings.py visual_opsd/training/test_trainer_errors.py", [
        ("the file comes before the flags", "{**(defaults or {}), **values, **given}",
         "{**(defaults or {}), **given, **values}"),
        ("a command's own defaults are lost", "{**(defaults or {}), **values, **given}",
         "{**values, **given}", "visual_opsd/training/test_interleaved.py::test_defaults_follow_the_mode"),
        ("yes is no", 'if lowered in ("true", "1", "yes", "on"):', 'if lowered in ("true", "1"):',
         "visual_opsd/test_settings.py::test_words_for_yes_and_no"),
        ("true is a number", "or (isinstance(value, bool) and base is not bool)", ""),
    ]),
]  # fmt: skip
