//! Keys, values and transactions.

use std::sync::Arc;

use sirocco_store::{Compare, LeaseId, MAX_TXN_OPS, Revision, StoreError, Txn};
use tokio::task::JoinSet;

use crate::fixture::{Fixture, Kind, TTL};

pub(crate) async fn a_value_put_is_the_value_read(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, key) = (&fixture.store, fixture.key("a"));
    assert_eq!(store.get(&key).await.unwrap(), None);

    let created = store.put(&key, "first").await.unwrap();
    let modified = store.put(&key, "second ✓").await.unwrap();
    assert!(modified > created);
    let entry = store.get(&key).await.unwrap().unwrap();
    assert_eq!((entry.key.as_str(), entry.value.as_str(), entry.lease), (key.as_str(), "second ✓", None));
    assert_eq!((entry.create_revision, entry.mod_revision), (created, modified));

    store.delete(&key).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap(), None);
    store.delete(&key).await.unwrap();
    let again = store.put(&key, "third").await.unwrap();
    assert_eq!(store.get(&key).await.unwrap().unwrap().create_revision, again);
}

pub(crate) async fn a_prefix_lists_its_keys_in_order_and_no_others(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let store = &fixture.store;
    for name in ["list/b", "list/a/1", "list0", "list/a", "list/ä", "lis", "list/"] {
        store.put(&fixture.key(name), name).await.unwrap();
    }
    let last = store.put(&fixture.key("list/c"), "list/c").await.unwrap();
    let listing = store.list(&fixture.key("list/")).await.unwrap();
    let values: Vec<&str> = listing.entries.iter().map(|entry| entry.value.as_str()).collect();
    assert_eq!(values, ["list/", "list/a", "list/a/1", "list/b", "list/c", "list/ä"]);
    assert!(listing.revision >= last);
    assert!(store.list(&fixture.key("nothing")).await.unwrap().entries.is_empty());
}

pub(crate) async fn a_transaction_is_all_or_nothing(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, key) = (&fixture.store, |name| fixture.key(name));
    for name in ["old/1", "old/2", "gone"] {
        store.put(&key(name), "x").await.unwrap();
    }
    let before = store.list(&key("")).await.unwrap().entries;
    let change = Txn::new().put(&key("new/1"), "1").put(&key("new/2"), "2").delete(&key("gone"));
    let change = change.delete_prefix(&key("old/"));

    let refused = change.clone().when(Compare::Exists(key("gone"))).when(Compare::Exists(key("never")));
    assert!(!store.txn(refused).await.unwrap().succeeded);
    assert_eq!(store.list(&key("")).await.unwrap().entries, before);

    let outcome = store.txn(change.when(Compare::Exists(key("gone")))).await.unwrap();
    assert!(outcome.succeeded);
    let after = store.list(&key("")).await.unwrap().entries;
    let names: Vec<&str> = after.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(names, [key("new/1"), key("new/2")]);
    assert!(after.iter().all(|entry| entry.mod_revision == outcome.revision), "one transaction is one revision");
}

pub(crate) async fn every_comparison_tells_true_from_false(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, key, absent) = (&fixture.store, fixture.key("here"), fixture.key("absent"));
    let lease = store.grant_lease(TTL * 30).await.unwrap().lease;
    let created = store.put(&key, "one").await.unwrap();
    let modified = store.txn(Txn::new().put_leased(&key, "two", lease)).await.unwrap().revision;
    let cases = [
        (Compare::Exists(key.clone()), true),
        (Compare::Exists(absent.clone()), false),
        (Compare::Absent(key.clone()), false),
        (Compare::Absent(absent.clone()), true),
        (Compare::CreatedAt(key.clone(), created), true),
        (Compare::CreatedAt(key.clone(), modified), false),
        (Compare::CreatedAt(absent.clone(), created), false),
        (Compare::ModifiedAt(key.clone(), modified), true),
        (Compare::ModifiedAt(key.clone(), created), false),
        (Compare::ModifiedAt(key.clone(), Revision(1)), false),
        (Compare::Value(key.clone(), "two".into()), true),
        (Compare::Value(key.clone(), "one".into()), false),
        (Compare::Value(absent.clone(), String::new()), false),
        (Compare::Lease(key.clone(), lease), true),
        (Compare::Lease(key.clone(), LeaseId(lease.0 + 1)), false),
        (Compare::Lease(absent, lease), false),
    ];
    for (compare, holds) in cases {
        let outcome = store.txn(Txn::new().when(compare.clone())).await.unwrap();
        assert_eq!(outcome.succeeded, holds, "{compare:?}");
    }
    assert_eq!(store.get(&key).await.unwrap().unwrap().mod_revision, modified, "comparing changes nothing");
}

pub(crate) async fn a_contradictory_transaction_is_refused(kind: Kind) {
    let fixture = Fixture::shared(kind).await;
    let (store, a, b) = (&fixture.store, fixture.key("a"), fixture.key("b"));
    let numbered = |txn: Txn, n: usize| txn.put(&fixture.key(&n.to_string()), "x");
    let cases = [
        (Txn::new().put(&b, "x").put(&a, "1").put(&a, "2"), format!("puts {a} twice")),
        (Txn::new().put(&a, "1").delete(&a), format!("both puts and deletes {a}")),
        (Txn::new().put(&a, "1").delete_prefix(&fixture.key("")), format!("both puts and deletes {a}")),
        (Txn::new().put(&b, "x").put("", "1"), "empty key".to_owned()),
        ((0..=MAX_TXN_OPS).fold(Txn::new(), numbered), format!("at most {MAX_TXN_OPS}")),
    ];
    for (txn, problem) in cases {
        let error = store.txn(txn).await.unwrap_err();
        assert!(matches!(error, StoreError::InvalidTxn { .. }), "{error}");
        assert!(error.to_string().contains(&problem), "{error}");
    }
    assert!(store.list(&fixture.key("")).await.unwrap().entries.is_empty());
    let most = (0..MAX_TXN_OPS).fold(Txn::new(), numbered);
    assert!(store.txn(most).await.unwrap().succeeded);
}

pub(crate) async fn concurrent_swaps_lose_no_update(kind: Kind) {
    const TASKS: usize = 4;
    const INCREMENTS: usize = 25;
    let fixture = Fixture::shared(kind).await;
    let key = fixture.key("counter");
    fixture.store.put(&key, "0").await.unwrap();
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let (store, key) = (Arc::clone(&fixture.store), key.clone());
        tasks.spawn(async move {
            let mut done = 0;
            while done < INCREMENTS {
                let entry = store.get(&key).await.unwrap().unwrap();
                let next = entry.value.parse::<usize>().unwrap() + 1;
                let unchanged = Compare::ModifiedAt(key.clone(), entry.mod_revision);
                // Between the read and the write is where another task gets in.
                tokio::task::yield_now().await;
                let swap = Txn::new().when(unchanged).put(&key, &next.to_string());
                done += usize::from(store.txn(swap).await.unwrap().succeeded);
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(fixture.store.get(&key).await.unwrap().unwrap().value, (TASKS * INCREMENTS).to_string());
}
