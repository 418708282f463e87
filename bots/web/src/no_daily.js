// Stands in for @daily-co/daily-js, which the client's other media manager fetches from the internet; ours does not use it.
export default null;
