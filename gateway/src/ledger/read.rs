//! Reading the books from outside: while a gateway runs, and when none does.
