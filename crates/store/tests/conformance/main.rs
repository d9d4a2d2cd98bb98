//! One set of claims about a store, each checked on both.
#![forbid(unsafe_code)]

mod elections;
mod fixture;
mod keys_and_values;
mod leases;
mod meddled;
mod mirrors;
mod registrations;
mod watches;

macro_rules! on_both_stores {
    ($($module:ident: $($claim:ident)*;)*) => {
        mod embedded {
            $($(#[tokio::test] async fn $claim() {
                super::$module::$claim(super::fixture::Kind::Embedded).await;
            })*)*
        }
        mod etcd {
            $($(#[tokio::test] async fn $claim() {
                super::$module::$claim(super::fixture::Kind::Etcd).await;
            })*)*
        }
    };
}

on_both_stores! {
    keys_and_values:
        a_value_put_is_the_value_read
        a_prefix_lists_its_keys_in_order_and_no_others
        a_transaction_is_all_or_nothing
        every_comparison_tells_true_from_false
        a_contradictory_transaction_is_refused
        concurrent_swaps_lose_no_update;
    leases:
        a_lease_kept_alive_outlives_its_time
        an_expired_lease_takes_its_keys_and_watchers_see_it
        a_revoked_lease_takes_its_keys_at_once
        a_put_without_a_lease_frees_the_key_of_it
        a_lost_lease_is_told;
    watches:
        a_watch_from_an_old_revision_has_no_gaps_while_writes_go_on
        a_transaction_reaches_watchers_whole
        a_watch_from_forgotten_history_says_so;
    mirrors:
        a_mirror_converges_and_never_shows_half_a_transaction
        a_mirror_recovers_from_compacted_history;
    elections:
        leadership_passes_in_order_of_arrival
        leadership_passes_when_the_leaders_lease_expires
        a_deposed_leaders_write_changes_nothing
        a_candidate_whose_lease_ends_is_told;
    registrations:
        records_follow_their_owner_and_vanish_on_close
        a_restart_after_a_kill_has_the_same_id_and_no_double_entry
        a_second_live_process_with_the_same_id_is_refused
        a_registration_comes_back_after_losing_its_lease
        closing_while_registering_again_leaves_nothing_behind
        a_deleted_claim_is_put_back
        a_dead_process_is_waited_for_though_its_lease_starts_anew;
}
