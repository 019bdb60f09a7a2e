"""Mistakes put into the package on purpose, each of which a test must catch: ``python tests/mutations.py``.

A mutation replaces one piece of text. The tests that are named with it run in a copy of the tree, first as it is,
when they must pass, and then with the mistake in it, when one of them must fail. The status is 1 if a mistake goes
unnoticed, or if its text is not in the package any more, which ``make test`` tells as well.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from conftest import processes_of

ROOT = Path(__file__).parents[1]
COPIED = ("pipetutor", "benchmarks", "tests", "tools", "pyproject.toml")
AT_ONCE = 2
SECONDS = 150  # for a test: a mistake may let it wait for what never comes


class Mutation(NamedTuple):
    """One mistake: where, what stands there, what stands there instead, and the tests that must catch it."""

    file: str
    old: str
    new: str
    tests: str


CORE = [
    Mutation(
        "core/partition.py",
        "stage * size + min(stage, rest)",
        "stage * size + max(0, stage - stages + rest)",
        "core/test_partition.py::test_bounds_are_deepspeeds",
    ),
    Mutation(
        "core/partition.py",
        "if heaviest - lightest <= spread:",
        "if heaviest - lightest < spread:",
        "core/test_partition.py::test_bounds_are_deepspeeds",
    ),
    Mutation(
        "core/batch.py",
        "round(train / (micro * replicas))",
        "round(train / micro)",
        "core/test_config.py::test_what_the_config_leaves_out_is_solved",
    ),
    Mutation(
        "core/config.py",
        'default["params"] | given.get("params", {})',
        'given.get("params", default["params"])',
        "core/test_config.py::test_an_optimizer_is_laid_over_the_defaults",
    ),
    Mutation(
        "core/layers.py",
        "if not torch.equal(expected, found[what]):",
        "if not torch.isfinite(found[what]).all():",
        "core/test_layers.py::test_a_model_that_only_looks_like_a_list_is_refused",
    ),
    Mutation(
        "core/model.py",
        "torch.manual_seed(int(own) >> 1)",
        "pass",
        "core/test_model.py::test_a_part_has_the_weights_of_the_whole_and_nothing_else",
    ),
    Mutation(
        "core/tied.py",
        "parameter.grad.add_(twin.grad)",
        "pass",
        "core/test_model.py::test_gradients_of_tied_places_are_added_up_apart_and_come_to_the_same",
    ),
    Mutation(
        "core/torch_engine.py",
        "dist.all_reduce(parameter.grad, group=group)",
        "pass",
        "core/test_model.py::test_tied_weights_stay_equal_and_losses_do_not_depend_on_the_stages",
    ),
    Mutation(
        "core/evaluate.py",
        "| (wanted == IGNORED)",
        "",
        "core/test_evaluate.py::test_a_sum_is_right_when_all_of_its_answer_is",
    ),
    Mutation(
        "core/limit.py",
        "_limit(self._bytes",
        "_limit(1e3 * self._bytes",
        "core/test_limit.py::test_a_model_that_one_process_has_no_memory_for_trains_in_two",
    ),
    Mutation(
        "core/gpt.py",
        "std = STD / (2 * layers) ** 0.5",
        "std = STD",
        "core/test_gpt.py",
    ),
    Mutation(
        "data/sums.py",
        "return train, [(a, b) for a, b in every if (min(a, b), max(a, b)) in held]",
        "return train, [(a, b) for a, b in every if (a, b) in held]",
        "data/test_sums.py",
    ),
    Mutation(
        "core/accumulate.py",
        "weight.grad.addmm_(rows.t(), inputs)",
        "weight.grad.copy_(rows.t() @ inputs)",
        "core/test_accumulate.py::test_three_micro_batches_give_the_gradients_of_autograd",
    ),
    Mutation(
        "core/recompute.py",
        "layer.inplace = False  # type: ignore[assignment]",
        "pass",
        "core/test_families.py::test_an_activation_that_works_in_place_begins_a_stage",
    ),
    Mutation(
        "core/recompute.py",
        "return nullcontext(), without_effect(self)",
        "return nullcontext(), nullcontext()",
        "core/test_recompute.py",
    ),
    Mutation(
        "core/evaluate.py",
        "[real.flatten()]",
        "[torch.ones_like(real).flatten()]",
        "core/test_evaluate.py::test_every_topology_finds_the_number_that_one_process_finds",
    ),
    Mutation(
        "core/evaluate.py",
        "torch.arange(count * micro_batch) * replicas + replica",
        "torch.arange(count * micro_batch) * replicas",
        "core/test_evaluate.py::test_every_image_is_in_one_share",
    ),
    Mutation(
        "core/deepspeed_engines.py",
        "self.deepspeed.train()",
        "pass",
        "core/test_evaluate.py::test_evaluation_does_not_disturb_training",
    ),
    Mutation(
        "core/deepspeed_engines.py",
        '{"gradient_clipping": 0.0} | config',
        "dict(config, gradient_clipping=config.get('gradient_clipping', 1.0))",
        "test_train.py::test_any_number_of_stages_computes_the_same_to_the_last_bit",
    ),
    Mutation(
        "core/deepspeed_engines.py",
        "if self.batch.replicas > 1:",
        "if self.batch.replicas > 2:",
        "core/test_evaluate.py::test_replicas_normalise_by_what_a_checkpoint_keeps",
    ),
    Mutation(
        "core/clipping.py",
        'and not getattr(p, "ds_pipe_replicated", False)',
        "",
        "core/test_clipping.py::test_a_tied_weight_counts_once",
    ),
    Mutation(
        "core/deepspeed_engines.py",
        "self.deepspeed.clip_fp32_gradients = self._clip",
        "pass",
        "core/test_clipping.py::test_deepspeeds_engine_clips_as_one_process_does",
    ),
    Mutation(
        "core/pieces.py",
        "self._of_trained(self.trained.detach()).copy_(self._of_parameter(value))",
        "pass",
        "core/test_checkpoint.py::test_zero_goes_on_from_any_stages_and_replicas",
    ),
    Mutation(
        "core/pieces.py",
        "return value.flatten().narrow(0, self.first, self.count)",
        "return value.flatten().narrow(0, 0, self.count)",
        "core/test_checkpoint.py::test_whatever_shares_out_a_checkpoint_is_the_same",
    ),
    Mutation(
        "core/checkpoint.py",
        'group["lr"] = lr',
        'group["lr"] = group["lr"]',
        "core/test_checkpoint.py::test_the_same_topology_goes_on_bit_for_bit",
    ),
    Mutation(
        "core/checkpoint.py",
        "older[: 1 - KEEP]",
        "older[:-KEEP]",
        "core/test_checkpoint.py::test_only_the_newest_two_are_kept",
    ),
    Mutation(
        "core/checkpoint.py",
        "shutil.rmtree(left)",
        "left.touch()",
        "core/test_checkpoint.py::test_a_crash_while_saving_leaves_the_checkpoint_before_it",
    ),
    Mutation(
        "core/loop.py",
        "self.step * self.engine.batch.replicas + self.engine.replica",
        "self.step",
        "core/test_dropout.py::test_replicas_draw_masks_of_their_own_after_a_change_of_topology",
    ),
    Mutation(
        "core/loop.py",
        "read = (self.step - self.done) * batch.accumulation",
        "read = self.step - self.done",
        "core/test_checkpoint.py::test_the_same_topology_goes_on_bit_for_bit",
    ),
    Mutation(
        "core/loop.py",
        "if len(micro_batch[0]) != ",
        "if len(micro_batch[0]) > ",
        "processes/test_faults.py::test_a_ragged_micro_batch_of_the_baseline_is_refused_as_well",
    ),
    Mutation(
        "core/torch_engine.py",
        "self._loss_fn(output, labels) / self._micro_batches",
        "self._loss_fn(output, labels)",
        "core/test_torch_engine.py::test_every_schedule_computes_what_one_process_computes",
    ),
    Mutation(
        "core/records.py",
        'if line["step"] <= step]',
        'if line["step"] < step]',
        "core/test_records.py::test_a_damaged_line_hides_neither_a_failure_nor_the_steps_before_it",
    ),
]
PIPEDREAM = "schedule/test_pipedream.py"
SCHEDULE = [
    Mutation("schedule/orders.py", "if number >= warm_up:", "if number > warm_up:", "schedule/test_orders.py"),
    Mutation(
        "schedule/orders.py",
        "(chunks - 1 - chunk) * ranks + rank",
        "chunk * ranks + rank",
        "schedule/test_orders.py",
    ),
    Mutation(
        "schedule/orders.py",
        "received + unsent if cross else unsent + received",
        "unsent + received",
        "schedule/test_orders.py",
    ),
    Mutation("schedule/orders.py", "else letter", 'else "F"', "schedule/test_orders.py"),
    Mutation("schedule/orders.py", '["0"] * below', '["1"] * below', "schedule/test_orders.py"),
    Mutation(
        "schedule/orders.py",
        "in reversed(range(micro_batches))",
        "in range(micro_batches)",
        "schedule/test_orders.py",
    ),
    Mutation(
        "schedule/pipedream.py", "forward[stage, micro_batch] = changed", "forward[stage, micro_batch] = 0", PIPEDREAM
    ),
    Mutation("schedule/rules.py", "number) < changed", "number) > changed", PIPEDREAM),
    Mutation(
        "schedule/rules.py", "[((name,), stage - 1)]", "[((name,), stage)]", "schedule/test_random_schedules.py"
    ),
    Mutation("schedule/formulas.py", "2 * ranks - 1 if", "2 * ranks - 2 if", "schedule/test_orders.py"),
    Mutation("schedule/simulate.py", "left + costs.latency", "left", "schedule/test_simulate.py"),
    Mutation("schedule/simulate.py", "max(self.burst, self.buffer)", "self.buffer", "schedule/test_simulate.py"),
    Mutation(
        "schedule/causes.py",
        "left, rank = self._flights.get((rank, index), (ready, rank))",
        "left = ready",
        "schedule/test_causes.py",
    ),
    Mutation(
        "schedule/causes.py",
        "found[place] = (before, rank) if queued else (made, sender)",
        "found[place] = (made, sender)",
        "schedule/test_causes.py::test_messages_that_wait_for_the_wire_are_one_behind_the_other",
    ),
    Mutation(
        "schedule/causes.py",
        'moments = [*spans["begin"][same], *spans["end"][~same][-1:]]',
        'moments = [*spans["begin"][same], *spans["end"][-1:]]',
        "schedule/test_causes.py",
    ),
    Mutation(
        "schedule/causes.py",
        "if awaited is None or awaited[0] in asked:",
        "if awaited is None:",
        "schedule/test_causes.py::test_clocks_that_disagree_close_no_circle",
    ),
    Mutation(
        "schedule/whatif.py",
        "return all(met)",
        "return False",
        "schedule/test_whatif.py::test_a_simulated_timeline_gives_its_streams_back",
    ),
    Mutation(
        "schedule/whatif.py",
        "waited & (spans",
        "(spans",
        "schedule/test_whatif.py::test_a_message_that_was_there_before_it_was_asked_for_says_nothing_of_its_way",
    ),
    Mutation("costs/links.py", "(ranks - 1) / ranks * size", "ranks / (ranks - 1) * size", "costs/test_links.py"),
    Mutation("costs/links.py", "min(costs.bandwidth, useful / 8)", "useful / 8", "costs/test_links.py"),
]
CERTIFIED = (
    "certify/test_certify.py::test_tied_weights_both_engines_clipping_and_zero_are_right_and_their_controls_are_not"
)
AROUND = [
    Mutation(
        "data/loader.py",
        "left[self._replica : len(left) // self._replicas * self._replicas : self._replicas]",
        "left[self._replica :: self._replicas]",
        "data/test_data.py::test_passes_are_shuffled_anew_and_never_ragged",
    ),
    Mutation(
        "data/loader.py",
        "generator=torch.Generator(),",
        "generator=None,",
        "core/test_checkpoint.py::test_the_same_topology_goes_on_bit_for_bit "
        "core/test_dropout.py test_train.py::test_two_passes_over_images_that_nothing_divides",
    ),
    Mutation(
        "data/fetch.py",
        "if found != md5:",
        "if not found:",
        "data/test_data.py::test_other_bytes_are_refused_after_drawing",
    ),
    Mutation(
        "system/cgroups.py",
        "least = min(least, int(found[1]) / int(found[2]))",
        "least = int(found[1]) / int(found[2])",
        "system/test_cgroups.py",
    ),
    Mutation(
        "tracing/clock.py",
        "return offsets[hosts.index(here)]",
        "return 0.0",
        "tracing/test_trace.py::test_clocks_of_two_hosts_are_brought_together",
    ),
    Mutation(
        "tracing/trace.py",
        "buffered = blocking and awaited is not None",
        "buffered = awaited is not None",
        "tracing/test_trace.py::test_waiting_by_hand",
    ),
    Mutation(
        "tracing/chrome.py",
        '1e6 * span["waiting"] + HAIR * receives',
        '1e6 * span["waiting"]',
        "tracing/test_trace.py::test_chrome_trace",
    ),
    Mutation(
        "tracing/view.py",
        "super().__init__((HOST, port), _Handler)",
        'super().__init__(("", port), _Handler)',
        "tracing/test_view.py::test_the_interface_and_the_trace_are_served_to_this_machine_alone",
    ),
    Mutation(
        "tracing/view.py",
        'self.send_header("Content-Security-Policy", ALONE)',
        "pass",
        "tracing/test_view.py::test_the_interface_and_the_trace_are_served_to_this_machine_alone",
    ),
    Mutation(
        "processes/heartbeat.py",
        "if beat.instruction in COLLECTIVES:",
        "if not beat.instruction:",
        "processes/test_faults.py::test_a_collective_that_all_have_come_to_is_no_circle",
    ),
    Mutation(
        "processes/children.py",
        "preexec_fn=lambda: end_with(me),",
        "preexec_fn=None,",
        "processes/test_supervise.py::test_a_supervisor_that_is_killed_takes_its_ranks_with_it",
    ),
    Mutation(
        "processes/children.py",
        "asked or INPUT in readable or os.getppid() != self._parent",
        "asked",
        "test_launcher.py::test_nothing_outlives_the_kernel",
    ),
    Mutation(
        "processes/diagnosis.py",
        "return int(code == -signal.SIGTERM)",
        "return 0",
        "processes/test_faults.py::test_a_rank_that_was_asked_to_end_followed_another_one",
    ),
    Mutation(
        "processes/agreement.py",
        "if (wanted := first.common.get(name)) != value:",
        "if (wanted := first.common.get(name)) is None:",
        "processes/test_agreement.py::test_what_one_host_refuses_ends_all_and_is_told_on_each",
    ),
    Mutation(
        "costs/table.py",
        "share * layer.first_saving",
        "layer.first_saving",
        "costs/test_costs.py::test_layers_add_up_to_stages",
    ),
    Mutation(
        "costs/memory.py",
        "(copies if recompute else saved)",
        "saved",
        "costs/test_memory.py::test_gpipe_keeps_all_micro_batches_and_1f1b_as_many_as_stages",
    ),
    Mutation(
        "costs/memory.py",
        "parameters * (1 + share * zero_stage)",
        "parameters",
        "costs/test_memory.py::test_zero_shares_out_the_optimizer_and_adds_a_copy_of_the_share",
    ),
    Mutation(
        "certify/proof.py",
        'difference if difference == difference else float("inf")',
        "difference",
        "certify/test_certify.py::test_one_wrong_entry_among_many_tensors_is_found",
    ),
    Mutation("certify/proof.py", "output.data = gradient", "pass", CERTIFIED),
    Mutation("certify/dualpipev.py", "self._stages[self.active_phase]", "self._stages[0]", CERTIFIED),
    Mutation(
        "certify/dualpipev.py",
        "2 * ranks - 1 - rank if second",
        "rank if second",
        "certify/test_dualpipev.py",
    ),
    Mutation(
        "figures/plots_timeline.py",
        "left = (begins + waits)[chosen]",
        "left = begins[chosen]",
        "figures/test_plots_timeline.py",
    ),
    Mutation(
        "figures/plots_timeline.py",
        "points[-1][1] != below):",
        "points[-1][1] == below):",
        "figures/test_plots_timeline.py::test_a_way_of_a_message_goes_aslant_from_rank_to_rank",
    ),
    Mutation(
        "lessons/predictions.py",
        "question.right = right if question.right is None else question.right",
        "question.right = right",
        "lessons/test_predict.py::test_the_first_prediction_counts",
    ),
    Mutation(
        "lessons/predictions.py",
        'percent or (self.unit == "%" and abs(number) > 1):',
        "percent:",
        "lessons/test_predict.py::test_a_share_may_be_typed_in_many_ways",
    ),
    Mutation(
        "lessons/hazards.py",
        'did.startswith("fails")',
        "False",
        "lessons/test_hazards.py::test_the_order_of_steps_decides_whether_a_race_does_harm",
    ),
    Mutation(
        "preflight.py",
        "if done == options.steps and options.eval_every is None:",
        "if done > options.steps:",
        "core/test_checkpoint.py::test_a_checkpoint_of_something_else_is_refused_before_anything_starts",
    ),
    Mutation(
        "launcher.py",
        "run_dir=_short(again)",
        "run_dir=_short(directory)",
        "test_launcher.py::test_a_run_is_recorded_and_the_printed_command_does_the_same_work_alone",
    ),
    Mutation(
        "train/trainers.py",
        "(accumulation * dist.get_world_size())",
        "accumulation",
        "core/test_checkpoint.py::test_other_replicas_and_the_baseline_go_on_with_equal_losses",
    ),
    Mutation(
        "train/joining.py",
        "(held := records.held(directory)) and not goes_on",
        "(held := records.held(directory)) and goes_on",
        "test_launcher.py::test_a_run_directory_that_holds_another_run_is_refused_and_left_as_it_is",
    ),
    Mutation(
        "options.py",
        "if value != one.metadata",
        "if value == one.metadata",
        "test_launcher.py::test_a_run_is_recorded_and_the_printed_command_does_the_same_work_alone",
    ),
    Mutation(
        "weights.py",
        "if shapes[name] != tuple(tensor.shape):",
        "if shapes[name] == ():",
        "core/test_checkpoint.py::test_weights_of_something_else_are_refused",
    ),
]
PLANNER = [
    Mutation(
        "planner/bound.py",
        "there + micro_batches * work + home + np.maximum",
        "there + micro_batches * (work + rest) + home + np.maximum",
        "planner/test_decoder.py::test_no_step_is_shorter_than_its_lower_bound",
    ),
    Mutation(
        "planner/bound.py",
        "np.maximum.accumulate(last - home)",
        "(last - home)",
        "planner/test_decoder.py::test_for_equal_stages_the_lower_bound_is_the_step",
    ),
    Mutation(
        "planner/cluster.py",
        "return 2 * (ranks - 1) * self.seconds(size / ranks)",
        "return 2 * self.seconds(size * (ranks - 1) / ranks)",
        "planner/test_cards.py::test_a_ring_sends_parts_from_neighbour_to_neighbour",
    ),
    Mutation(
        "planner/layout.py",
        "(stage * self.replicas + replica) // self.places",
        "(replica * self.stages + stage) // self.places",
        "planner/test_cards.py::test_ranks_lie_where_counting_them_out_puts_them",
    ),
    Mutation(
        "planner/layout.py",
        "self.replicas >= self.places or",
        "self.replicas > 1 or",
        "planner/test_cards.py::test_ranks_lie_where_counting_them_out_puts_them",
    ),
    Mutation(
        "planner/decoder.py",
        "ahead + 1), freed]",
        "ahead), freed]",
        "planner/test_decoder.py::test_live_activations_are_those_of_the_simulator",
    ),
    Mutation(
        "planner/decoder.py",
        "product + 2 * attention + 2 * added",
        "product + attention + 2 * added",
        "planner/test_decoder.py::test_the_parts_of_a_step_are_the_step_and_its_work_is_eq_3",
    ),
    Mutation(
        "planner/decoder.py",
        "1.5 if layout.zero_stage else 1.0",
        "1.5",
        "planner/test_decoder.py::test_messages_means_and_steps_take_what_their_links_take",
    ),
    Mutation(
        "planner/decoder.py",
        "last + head)",
        "last)",
        "planner/test_decoder.py::test_equal_blocks_are_cut_as_well_as_by_the_search",
    ),
    Mutation(
        "planner/search.py",
        "if alike and seconds >= alike.seconds:",
        "if alike:",
        "planner/test_plan.py::test_nothing_is_lost_by_not_playing_all",
    ),
    Mutation(
        "planner/search.py",
        "ranked[top - 1] if len(ranked) >= top",
        "ranked[0] if ranked",
        "planner/test_plan.py::test_nothing_is_lost_by_not_playing_all",
    ),
    Mutation(
        "planner/search.py",
        'and "recompute" not in each and',
        "and",
        "planner/test_plan.py::test_nothing_is_lost_by_not_playing_all",
    ),
    Mutation(
        "planner/search.py",
        "max(timelines, key",
        "min(timelines, key",
        "planner/test_plan.py::test_replicas_that_cross_links_apart_are_all_played",
    ),
    Mutation(
        "planner/measured.py",
        'row["parameters"] + row["optimizer"] + row["peak"]',
        'row["parameters"] + row["peak"]',
        "planner/test_plan.py::test_measured_costs_are_planned_as_their_runs_are_predicted",
    ),
    Mutation(
        "planner/plan.py",
        "max(more, key=lambda name: more[name])",
        "max(after.parts, key=lambda name: after.parts[name])",
        "planner/test_plan.py::test_plans_are_a_table_that_says_why_the_next_one_loses",
    ),
    Mutation(
        "planner/transformers.py",
        "self.width * tensor)",
        "self.width)",
        "planner/test_cards.py::test_activations_are_eq_2_of_the_paper",
    ),
    Mutation(
        "planner/reading.py",
        "(8 if unit",
        "(1 if unit",
        "planner/test_cards.py::test_a_quantity_is_a_number_and_a_unit",
    ),
    Mutation(
        "planner/transformers.py",
        "blocks + 3 * self.head_flops",
        "blocks + (3 + recompute) * self.head_flops",
        "planner/test_cards.py::test_flops_are_eq_3_and_what_torch_multiplies",
    ),
]

HOSTS = [
    Mutation(
        "processes/host.py",
        "    kill_descendants()\n",
        "",
        "processes/test_hosts.py::test_whatever_is_killed_nothing_is_left",
    ),
    Mutation(
        "processes/network.py",
        "        *limits(link, interface),\n",
        "",
        "processes/test_hosts.py::test_a_link_lets_through_what_its_rate_allows_and_links_differ",
    ),
    Mutation(
        "processes/host.py",
        "if network == _network() else (-1, 0)",
        "if network != _network() else (-1, 0)",
        "processes/test_hosts.py::test_a_link_that_is_cut_is_told_with_who_waits_for_whom",
    ),
    Mutation(
        "processes/supervise.py",
        "cut = network.cut() if network else []",
        "cut = []",
        "processes/test_hosts.py::test_a_link_that_is_cut_is_told_with_who_waits_for_whom",
    ),
    Mutation(
        "train/joining.py",
        '    found["code of pipetutor"] = code_digest()\n',
        "",
        "processes/test_hosts.py::test_other_code_on_another_host_is_told",
    ),
    Mutation(
        "system/links.py",
        "pair not in pairs or pair in found",
        "pair not in pairs",
        "system/test_namespaces.py::test_a_pair_that_is_not_there_is_refused",
    ),
]
BOARD_JUDGES = "figures/test_board.py::test_the_board_judges_and_plays_as_the_package_does"
BOARD = [
    Mutation("figures/board.js", "Math.max(wires.get(wire) ?? 0, end)", "end", BOARD_JUDGES),
    Mutation("figures/board.js", "arrive = left + costs.latency", "arrive = left", BOARD_JUDGES),
    Mutation("figures/board.js", "held > game.cap", "held >= game.cap", BOARD_JUDGES),
    Mutation("figures/board.js", "(one) => one.made - one.begin", "(one) => one.start - one.begin", BOARD_JUDGES),
    Mutation("figures/board.js", 'pass.kind === "B" && halved', "halved", BOARD_JUDGES),
    Mutation("figures/board.js", 'if (!game.split && "IW"', 'if ("IW"', BOARD_JUDGES),
    Mutation(
        "figures/board.js",
        "place.index > index",
        "place.index < 0",
        "figures/test_board.py::test_a_board_says_why_it_refuses",
    ),
    Mutation(
        "figures/board.py",
        '.replace("<", "\\\\u003c")',
        "",
        "figures/test_board.py::test_a_page_has_figures_with_words_and_one_module_for_its_boards",
    ),
]

ENGINE = [
    Mutation(
        "core/play.py", ".requires_grad_()", "", "core/test_play.py::test_it_computes_what_one_process_computes"
    ),
    Mutation(
        "core/play.py",
        "loss_fn(y, targets[number]) / count",
        "loss_fn(y, targets[number])",
        "core/test_play.py::test_it_computes_what_one_process_computes",
    ),
    Mutation(
        "core/play.py",
        "* len(holder) + sender) * count + number",
        "* len(holder) + sender)",
        "core/test_play.py::test_any_stage_may_be_on_any_rank_and_whole_and_halved_passes_mix",
    ),
    Mutation(
        "processes/ranks.py",
        'forked(works, folder / "log", asked["deadline"], stay=True, silent=ask)',
        'forked(works, folder / "log", asked["deadline"], stay=False, silent=ask)',
        "processes/test_ranks.py::test_a_rank_that_waits_for_one_that_has_returned_is_told_so_and_not_of_a_lost_connection",
    ),
    Mutation(
        "processes/ranks.py",
        "heartbeat.ask_for_stacks(folder, pids)",
        "pass",
        "processes/test_ranks.py::test_a_deadlock_is_ended_and_says_where_each_rank_stands",
    ),
    Mutation(
        "processes/ranks.py",
        ".replace(co_filename=file)",
        "",
        "processes/test_ranks.py::test_from_a_cell",
    ),
    Mutation(
        "processes/ranks.py",
        'sys.path += [path for path in asked["path"] if path not in sys.path]',
        "pass",
        "processes/test_ranks.py::test_from_a_cell",
    ),
    Mutation(
        "processes/ranks.py",
        "        if failed:\n            return",
        "",
        "processes/test_ranks.py::test_no_call_is_made_after_one_that_fails",
    ),
    Mutation(
        "certify/own.py",
        'SEED + 1 if case.control == "weights"',
        'SEED if case.control == "weights"',
        "certify/test_own_engine.py::test_a_right_engine_passes_and_its_controls_are_found_out",
    ),
    Mutation(
        "certify/own.py",
        "losses.append(_number(loss) if rank == ranks - 1 else wanted[step])",
        "losses.append(wanted[step])",
        "certify/test_own_engine.py::test_a_wrong_engine_is_told_why",
    ),
    Mutation(
        "certify/own.py",
        "if kept > most:",
        "if kept > case.micro_batches:",
        "certify/test_own_engine.py::test_a_wrong_engine_is_told_why",
    ),
    Mutation(
        "certify/own.py",
        'rank["most_alive"] > most + 1',
        'rank["most_alive"] > most + 9',
        "certify/test_own_engine.py::test_a_wrong_engine_is_told_why",
    ),
]
MUTATIONS = [*CORE, *SCHEDULE, *AROUND, *HOSTS, *PLANNER, *BOARD, *ENGINE]


def status(tests: str, mutation: Mutation | None = None) -> int:
    """Run tests in a copy of the tree, with a mistake in it or without, and return pytest's status."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory, "tree")
        place.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, place / name)
        if mutation:
            file = place / "pipetutor" / mutation.file
            file.write_text(file.read_text().replace(mutation.old, mutation.new, 1))
        command = [sys.executable, "-m", "pytest", "-q", "-x"]
        command += [f"--timeout={SECONDS}"] if mutation else ["-n", str(AT_ONCE), "--dist", "worksteal"]
        command += [f"--basetemp={directory}/runs", *(f"tests/{test}" for test in tests.split())]
        environment = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{place / 'tools'}"}
        with open(place / "said", "w+") as said:
            done = subprocess.run(command, cwd=place, env=environment, stdout=said, stderr=subprocess.STDOUT)
            for process in processes_of(Path(directory)):  # which a test that was ended with its time over has left
                process.kill()
            said.seek(0)
            if done.returncode > 1:
                print(said.read()[-3000:], file=sys.stderr)
        return done.returncode


def misfit(mutation: Mutation) -> str:
    """Say why a mistake cannot be tried, if so: its text must stand in its file once, and its tests must be there."""
    file = ROOT / "pipetutor" / mutation.file
    times = file.read_text().count(mutation.old) if file.exists() else 0
    if times != 1:
        return f"its text is there {times} times"
    for test in mutation.tests.split():
        path, _, name = test.partition("::")
        known = ROOT / "tests" / path
        if not known.exists() or (f"def {name}(" if name else "") not in known.read_text():
            return f"there is no {test}"
    return ""


def verdict(mutation: Mutation) -> str:
    """Say what became of a mistake."""
    if why := misfit(mutation):
        return f"ERROR: {why}"
    found = status(mutation.tests, mutation)
    return {0: "LIVES ON", 1: "caught"}.get(found, f"ERROR: pytest ended with status {found}")


def main() -> int:
    """Try all mutations, or those of the files whose names hold a word of the command line."""
    chosen = [one for one in MUTATIONS if not sys.argv[1:] or any(word in one.file for word in sys.argv[1:])]
    if not chosen:
        print(f"no mutation is of a file whose name holds {' or '.join(sys.argv[1:])}")
        return 2
    tests = " ".join(dict.fromkeys(test for one in chosen for test in one.tests.split()))
    if status(tests):
        print("the tests do not pass without a mutation")
        return 1
    verdicts = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutation, said in zip(chosen, pool.map(verdict, chosen), strict=True):
            verdicts.append(said)
            print(f"{said:10} {mutation.file}: {mutation.old}  ->  {mutation.new}", flush=True)
    caught = verdicts.count("caught")
    print(f"{caught} of {len(chosen)} mutations are caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
