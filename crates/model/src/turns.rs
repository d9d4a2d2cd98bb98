//! Futures of one task that compute between their waits.

use std::task::Poll;

use futures::future::poll_fn;

/// The outputs of `futures`, in order, or the first error. After each of them the task goes back to its runtime, so that what
/// one has sent is on its way before the next computes.
pub(crate) async fn by_turns<T, E, F: Future<Output = Result<T, E>>>(
    futures: impl IntoIterator<Item = F>,
) -> Result<Vec<T>, E> {
    let mut futures: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    let mut turn = 0;
    poll_fn(|cx| {
        if let Some((future, output @ None)) = futures.get_mut(turn)
            && let Poll::Ready(done) = future.as_mut().poll(cx)?
        {
            *output = Some(done);
        }
        turn += 1;
        if turn < futures.len() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        turn = 0;
        if futures.iter().any(|(_, output)| output.is_none()) { Poll::Pending } else { Poll::Ready(Ok(())) }
    })
    .await?;
    Ok(futures.into_iter().filter_map(|(_, output)| output).collect())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use futures::executor::LocalPool;
    use futures::task::LocalSpawnExt as _;

    use super::*;

    #[test]
    fn what_one_sends_goes_out_before_the_next_computes() {
        let log = RefCell::new(Vec::new());
        let log = &*Box::leak(Box::new(log));
        let mut pool = LocalPool::new();
        let spawner = pool.spawner();
        let work = |name: &'static str| {
            let spawner = spawner.clone();
            async move {
                for _ in 0..2 {
                    log.borrow_mut().push(format!("compute {name}"));
                    let sent =
                        spawner.spawn_local_with_handle(async move { log.borrow_mut().push(format!("send {name}")) });
                    sent.unwrap().await;
                }
                Ok::<_, String>(name)
            }
        };
        let names = pool.run_until(by_turns([work("a"), work("b")]));
        assert_eq!(names, Ok(vec!["a", "b"]));
        let log = log.borrow();
        for pair in log.chunks(2) {
            assert_eq!(pair[0].replace("compute", "send"), pair[1], "{log:?}");
        }
    }
}
